"""Number formats: what a scheme is, differentiable fake quantization, packing, activation quantizers."""

from lrquant.formats.fake_quant import fake_quantize, fake_quantize_weight, quantize_weight
from lrquant.formats.fake_quant_math import Factors
from lrquant.formats.qparams import Grid
from lrquant.formats.schemes import Scheme

__all__ = ["Factors", "Grid", "Scheme", "fake_quantize", "fake_quantize_weight", "quantize_weight"]
