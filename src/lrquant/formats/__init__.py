"""Number formats: what a scheme is, differentiable fake quantization, packing, activation quantizers."""

from lrquant.formats.fake_quant import fake_quantize, fake_quantize_weight, quantize_weight
from lrquant.formats.grids import Grid
from lrquant.formats.rows import Factors
from lrquant.formats.schemes import Scheme

__all__ = ["Factors", "Grid", "Scheme", "fake_quantize", "fake_quantize_weight", "quantize_weight"]
