"""Qwen2 and Qwen2.5: Llama's block with biases on queries, keys and values."""

from lrquant.architectures.family import Family
from lrquant.architectures.gated_decoder import RESIDUAL, gated_decoder

FAMILY = Family("qwen2", ("qwen2",), "model.layers", gated_decoder, residual=RESIDUAL)
