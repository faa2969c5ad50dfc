"""Falcon: LayerNorm, attention and MLP side by side, one projection for q, k and v, linears without biases."""

from typing import Any

from lrquant.architectures.family import Family, ResidualStream
from lrquant.architectures.layouts import grouped, rope_pairs, stacked, unpaired
from lrquant.transforms import Equivalence, NormToLinears, QueryKey, ValueToOutput

QKV, UP, DOWN = "self_attention.query_key_value", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
RESIDUAL = ResidualStream(("self_attention.dense", DOWN), DOWN, ("word_embeddings",), "ln_f")


def equivalences(config: Any) -> tuple[Equivalence, ...]:
    head_dim = config.hidden_size // config.num_attention_heads
    if config.new_decoder_architecture:
        kv_heads = config.num_kv_heads
        heads = grouped(kv_heads, config.num_attention_heads // kv_heads, head_dim)
    elif config.multi_query:
        heads = stacked(1, config.num_attention_heads, head_dim)
    else:
        heads = grouped(config.num_attention_heads, 1, head_dim)
    return (
        *_norms(config),
        ValueToOutput(QKV, "self_attention.dense", heads.value, heads.output),
        QueryKey(QKV, QKV, heads.query, heads.key, unpaired(head_dim) if config.alibi else rope_pairs(head_dim)),
    )


def _norms(config: Any) -> tuple[NormToLinears, ...]:
    if config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2):
        return NormToLinears("ln_attn", (QKV,)), NormToLinears("ln_mlp", (UP,))
    if config.new_decoder_architecture or config.parallel_attn:
        return (NormToLinears("input_layernorm", (QKV, UP)),)
    return NormToLinears("input_layernorm", (QKV,)), NormToLinears("post_attention_layernorm", (UP,))


FAMILY = Family("falcon", ("falcon",), "transformer.h", equivalences, residual=RESIDUAL)
