"""Gemma 2: norms that multiply by 1 + weight, and a second norm behind each sublayer."""

from functools import partial

from lrquant.architectures.family import Family
from lrquant.architectures.gated_decoder import NORMS_BEHIND, gated_decoder

FAMILY = Family(
    "gemma2",
    ("gemma2",),
    "model.layers",
    partial(gated_decoder, mlp_norm="pre_feedforward_layernorm", norm_offset=1.0),
    residual=NORMS_BEHIND,
)
