"""Eight-bit floating point, E4M3: a sign, four bits of exponent, three of mantissa; the largest magnitude is 448.

Numbers are spaced by an eighth of their power of two, from 2⁻⁶ down by 2⁻⁹. There is no infinity: what is larger
saturates, and no number becomes NaN. Rounding is PyTorch's cast, to nearest, ties to even codes. Numbers lie in so many
octaves that a rounding offset is in units of their spacing where a value stands.

| format | a scale is shared by | runtimes |
|---|---|---|
| FP8 | weights: an output channel; inputs: a token, at run time | kernels of Hopper, Ada and later |
| FP8_STATIC | inputs: all tokens, found in calibration | the same, without measuring at run time |
| FP8_BLOCK, FP8_BLOCK_INPUTS | weights: 128 × 128; inputs: 128 channels of a token | DeepSeek-like models' kernels |
| MXFP8 | 32 values of a row, a power of two | OCP MX hardware |
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lrquant.formats.mx import GROUP_SIZE, PowersOfTwo
from lrquant.formats.number_format import NumberFormat
from lrquant.formats.presets import CACHES, NamedFormat, register
from lrquant.formats.qparams import Static, Symmetric

BLOCK = 128


@dataclass(frozen=True)
class E4M3:
    """Numbers up to ±448 in units of their scale; a code is the number itself, in PyTorch's dtype."""

    kind: Literal["float"] = "float"
    bits: int = 8
    low: float = -448.0
    high: float = 448.0

    def nearest(self, clamped: Tensor) -> Tensor:
        return clamped.to(torch.float8_e4m3fn).to(clamped.dtype)

    def spacing(self, place: Tensor) -> Tensor:
        power = place.abs().float().clamp(min=2.0**-6).view(torch.int32) & 0x7F800000  # the mantissa's bits cleared
        return (power.view(torch.float32) / 8).to(place.dtype)

    def encode(self, numbers: Tensor) -> Tensor:
        return numbers.to(torch.float8_e4m3fn)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.float()


FP8 = NumberFormat(E4M3(), Symmetric())
FP8_STATIC = NumberFormat(E4M3(), Static())
FP8_BLOCK = NumberFormat(E4M3(), Symmetric(), BLOCK, BLOCK)
FP8_BLOCK_INPUTS = NumberFormat(E4M3(), Symmetric(), BLOCK)
MXFP8 = NumberFormat(E4M3(), PowersOfTwo(), GROUP_SIZE)

CACHES["fp8"] = FP8_STATIC
register(
    NamedFormat("fp8", FP8, FP8, beside_integers=True),
    {
        "w4a8-fp8": {
            "input_numbers": "fp8",
            "wbits": 4,
            "abits": 8,
            "group_size": BLOCK,
            "symmetric": True,
            "quantize_attention": False,
        }
    },
)
register(NamedFormat("fp8-static", FP8, FP8_STATIC, weight_only=False))
register(NamedFormat("fp8-block", FP8_BLOCK, FP8_BLOCK_INPUTS, weight_only=False))
register(NamedFormat("mxfp8", MXFP8, MXFP8))
