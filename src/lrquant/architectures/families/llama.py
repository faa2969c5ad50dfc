"""Llama 1, 2, 3 and other models of the same block, with or without grouped-query attention."""

from lrquant.architectures.family import Family
from lrquant.architectures.gated_decoder import RESIDUAL, gated_decoder

FAMILY = Family("llama", ("llama",), "model.layers", gated_decoder, residual=RESIDUAL)
