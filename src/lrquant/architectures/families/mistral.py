"""Mistral: Llama's block with a sliding window."""

from lrquant.architectures.family import Family
from lrquant.architectures.gated_decoder import RESIDUAL, gated_decoder

FAMILY = Family("mistral", ("mistral",), "model.layers", gated_decoder, residual=RESIDUAL)
