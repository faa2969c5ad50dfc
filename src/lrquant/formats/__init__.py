"""Number formats: the table, differentiable fake quantization, activation quantizers, layouts on disk."""

from lrquant.formats import fp4, fp8, integers  # noqa: F401 - rows of the table
from lrquant.formats.fake_quant import fake_quantize, fake_quantize_weight, quantize_weight
from lrquant.formats.fake_quant_math import Factors
from lrquant.formats.number_format import NumberFormat
from lrquant.formats.presets import NamedFormat, format_of, register
from lrquant.formats.schemes import Scheme

__all__ = [
    "Factors",
    "NamedFormat",
    "NumberFormat",
    "Scheme",
    "fake_quantize",
    "fake_quantize_weight",
    "format_of",
    "quantize_weight",
    "register",
]
