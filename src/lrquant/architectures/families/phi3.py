"""Phi-3 and Phi-4: Llama's block with q, k, v in one projection and gate, up in another."""

from typing import Any

import torch

from lrquant.architectures.family import Family
from lrquant.architectures.gated_decoder import RESIDUAL, head_counts
from lrquant.architectures.layouts import rope_pairs, stacked
from lrquant.transforms import Equivalence, NormToLinears, QueryKey, UpToDown, ValueToOutput

QKV, GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"


def equivalences(config: Any) -> tuple[Equivalence, ...]:
    kv_heads, group, head_dim = head_counts(config)
    heads = stacked(kv_heads, group, head_dim)
    width = config.intermediate_size
    rotary_dim = int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    return (
        NormToLinears("input_layernorm", (QKV,)),
        NormToLinears("post_attention_layernorm", (GATE_UP,)),
        ValueToOutput(QKV, "self_attn.o_proj", heads.value, heads.output),
        QueryKey(QKV, QKV, heads.query, heads.key, rope_pairs(head_dim, rotary_dim)),
        UpToDown(GATE_UP, "mlp.down_proj", torch.arange(width, 2 * width)),
    )


FAMILY = Family("phi3", ("phi3",), "model.layers", equivalences, residual=RESIDUAL)
