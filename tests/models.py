"""A small random model of every family and its variants, and how to compute with it beyond rounding."""

from copy import deepcopy
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

WIDTH = 64
VOCABULARY = 97

_COMMON = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
           "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
_GATED = {"intermediate_size": 96, "num_key_value_heads": 2}
_FALCON = {"alibi": False, "parallel_attn": True, "bias": False}
_GEMMA = _GATED | {"head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_OPT = {"ffn_dim": 96, "word_embed_proj_dim": WIDTH, "activation_function": "relu"}
_NEOX = {"intermediate_size": 96, "rotary_pct": 0.25}

# name → (model_type, what differs from _COMMON)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GATED | {"tie_word_embeddings": False}),
    "llama-tied": ("llama", _GATED | {"tie_word_embeddings": True}),
    "llama-biases": ("llama", _GATED | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", _GATED | {"sliding_window": 4}),
    "mistral-wide-heads": ("mistral", _GATED | {"head_dim": 24}),
    "qwen2": ("qwen2", _GATED),
    "qwen3": ("qwen3", _GATED | {"head_dim": 24}),
    "gemma2": ("gemma2", _GEMMA | {"attn_implementation": "eager"}),  # only eager caps the scores
    "gemma3": ("gemma3_text", _GEMMA),
    "phi3": ("phi3", _GATED),
    "phi3-partial-rotary": ("phi3", _GATED | {"partial_rotary_factor": 0.75}),
    "opt": ("opt", _OPT),
    "opt-gelu": ("opt", _OPT | {"activation_function": "gelu"}),
    "opt-norm-after": ("opt", _OPT | {"do_layer_norm_before": False}),
    "opt-bare-norms": ("opt", _OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "neox": ("gpt_neox", _NEOX),
    "neox-full-rotary": ("gpt_neox", _NEOX | {"rotary_pct": 1.0}),
    "neox-sequential": ("gpt_neox", _NEOX | {"use_parallel_residual": False}),
    "neox-no-bias": ("gpt_neox", _NEOX | {"attention_bias": False}),
    "falcon-grouped": ("falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-one-norm": (
        "falcon",
        _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-multi-query": ("falcon", _FALCON | {"multi_query": True}),
    "falcon-alibi-eager": ("falcon", _FALCON | {"alibi": True, "attn_implementation": "eager"}),
    "falcon-alibi": ("falcon", _FALCON | {"multi_query": False, "alibi": True, "parallel_attn": False, "bias": True}),
}


@cache
def config_of(name: str) -> Any:
    model_type, changes = MODELS[name]
    return AutoConfig.for_model(model_type, **_COMMON | changes)


@torch.no_grad()
def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A fresh model, the same on every call. Norm weights and biases are random, so that losing one shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepcopy(config_of(name)), dtype=dtype)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # around the 1 of norms, the 0 of Gemma's norms and of biases
            parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
        else:
            parameter.normal_(std=WIDTH**-0.5)
    return model.eval()


def token_ids(samples: int, tokens: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (samples, tokens), generator=generator)


class InDouble(TorchFunctionMode):
    """Within, model code that asks for float32 (norms and softmax do) gets float64: rounding falls to 1e-16."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return function(*(torch.float64 if value is torch.float32 else value for value in args), **kwargs)


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    with InDouble():
        return model(input_ids=ids, use_cache=False).logits
