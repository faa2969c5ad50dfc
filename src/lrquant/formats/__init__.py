"""Number formats: what a scheme is, differentiable fake quantization, packing, activation quantizers."""

from lrquant.formats.fake_quant import Grid, fake_quantize, fake_quantize_weight, quantize_weight
from lrquant.formats.schemes import Scheme

__all__ = ["Grid", "Scheme", "fake_quantize", "fake_quantize_weight", "quantize_weight"]
