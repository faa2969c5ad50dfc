"""GPT-NeoX and Pythia: LayerNorm, one projection for q, k and v, rotary embedding on part of a head."""

from typing import Any

from lrquant.architectures.family import Family, ResidualStream
from lrquant.architectures.layouts import grouped, rope_pairs
from lrquant.transforms import Equivalence, NormToLinears, QueryKey, ValueToOutput

QKV = "attention.query_key_value"
RESIDUAL = ResidualStream(
    ("attention.dense", "mlp.dense_4h_to_h"), "mlp.dense_4h_to_h", ("embed_in",), "final_layer_norm"
)


def equivalences(config: Any) -> tuple[Equivalence, ...]:
    head_dim = config.hidden_size // config.num_attention_heads
    heads = grouped(config.num_attention_heads, 1, head_dim)
    rotary_dim = int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    return (
        NormToLinears("input_layernorm", (QKV,)),
        NormToLinears("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        ValueToOutput(QKV, "attention.dense", heads.value, heads.output),
        QueryKey(QKV, QKV, heads.query, heads.key, rope_pairs(head_dim, rotary_dim)),
    )


FAMILY = Family("gpt_neox", ("gpt_neox",), "gpt_neox.layers", equivalences, residual=RESIDUAL)
