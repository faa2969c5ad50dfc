"""A small random Llama with the bundled tokenizer, as a folder on disk: what end-to-end tests quantize."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lrquant.zoo import zoo_model_path

SETTINGS: dict[str, Any] = {"calibration": "zoo:pydoc", "nsamples": 4, "seqlen": 32, "epochs": 1, "batch_size": 2}


@torch.no_grad()
def write_tiny(folder: Path, model_type: str = "llama", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Save a two-block model whose linears have 64 and 128 inputs."""
    tokenizer = AutoTokenizer.from_pretrained(zoo_model_path("llama"))
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings | changes), dtype=dtype)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "embed" not in name:
            parameter.mul_(4)  # so that blocks do something next to the residual
        elif parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
