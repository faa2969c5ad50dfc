"""Llama's kind of block: RMSNorm, rotary grouped-query attention, gated MLP."""

from dataclasses import replace
from typing import Any

from lrquant.architectures.family import ResidualStream
from lrquant.architectures.layouts import Heads, rope_pairs, separate
from lrquant.transforms import Equivalence, NormToLinears, QueryKey, UpToDown, ValueToOutput

RESIDUAL = ResidualStream(("self_attn.o_proj", "mlp.down_proj"), "mlp.down_proj", ("embed_tokens",), "norm")
NORMS_BEHIND = replace(RESIDUAL, why_not="a norm follows each sublayer, and its weights scale single channels")


def head_counts(config: Any) -> tuple[int, int, int]:
    """(key/value heads, query heads per key/value head, head dimension)."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return kv_heads, heads // kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def gated_decoder(
    config: Any,
    mlp_norm: str = "post_attention_layernorm",
    norm_offset: float = 0.0,
    query_key_norm: bool = False,
) -> tuple[Equivalence, ...]:
    """Transformations of a Llama-like block. Gemma's norms multiply by 1 + weight: `norm_offset` 1."""
    kv_heads, group, head_dim = head_counts(config)
    heads: Heads = separate(kv_heads, group, head_dim)
    rotary_dim = int(head_dim * (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0))
    return (
        NormToLinears("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), norm_offset),
        NormToLinears(mlp_norm, ("mlp.gate_proj", "mlp.up_proj"), norm_offset),
        ValueToOutput("self_attn.v_proj", "self_attn.o_proj", heads.value, heads.output),
        QueryKey(
            "self_attn.q_proj",
            "self_attn.k_proj",
            heads.query,
            heads.key,
            rope_pairs(head_dim, rotary_dim),
            query_norm="self_attn.q_norm" if query_key_norm else None,
            key_norm="self_attn.k_norm" if query_key_norm else None,
            offset=norm_offset,
        ),
        UpToDown("mlp.up_proj", "mlp.down_proj"),
    )
