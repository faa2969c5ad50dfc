"""Qwen3: Llama's block with norms on queries and keys, shared by the heads."""

from functools import partial

from lrquant.architectures.family import Family
from lrquant.architectures.gated_decoder import RESIDUAL, gated_decoder

FAMILY = Family("qwen3", ("qwen3",), "model.layers", partial(gated_decoder, query_key_norm=True), residual=RESIDUAL)
