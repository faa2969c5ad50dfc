"""Small random mixtures of experts of many families, and models whose linears are not `nn.Linear` for other reasons."""

from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
_TWO_OF_FOUR = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_DEEPSEEK = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip

# name → (model_type, what differs from COMMON)
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", _LOCAL),
    "qwen2_moe": ("qwen2_moe", _TWO_OF_FOUR | {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1}),
    "qwen3_moe": ("qwen3_moe", _TWO_OF_FOUR | {"head_dim": 32, "decoder_sparse_step": 1}),
    "olmoe": ("olmoe", _LOCAL | {"num_experts": 4}),
    "deepseek_v3": ("deepseek_v3", _DEEPSEEK),  # a dense block first, shared experts
    "granitemoe": ("granitemoe", _LOCAL),  # checkpoints hold the experts fused
    "phimoe": ("phimoe", _LOCAL),
    "gpt_oss": ("gpt_oss", _LOCAL | {"head_dim": 16, "sliding_window": 16}),  # transposed, interleaved, biases
    "llama4": ("llama4_text", {  # every expert is handed all tokens
        "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 64,
        "interleave_moe_layer_step": 1, "attention_chunk_size": 32}),
}  # fmt: skip
GPT2 = ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 128})  # Conv1D


@cache
def config_of(name: str) -> Any:
    model_type, changes = GPT2 if name == "gpt2" else MIXTURES[name]
    return AutoConfig.for_model(model_type, **COMMON | changes)


@torch.no_grad()
def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A fresh model, the same on every call, whose blocks and experts do something."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name), dtype=dtype)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)
        else:
            parameter.normal_(std=0.5 * parameter.shape[-1] ** -0.5)
    return model.eval()
