"""Gemma 3 (text): Gemma 2's block with norms on queries and keys."""

from functools import partial

from lrquant.architectures.family import Family
from lrquant.architectures.gated_decoder import NORMS_BEHIND, gated_decoder

FAMILY = Family(
    "gemma3",
    ("gemma3_text",),
    "model.layers",
    partial(gated_decoder, mlp_norm="pre_feedforward_layernorm", norm_offset=1.0, query_key_norm=True),
    residual=NORMS_BEHIND,
)
