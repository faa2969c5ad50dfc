"""Four-bit floating point, E2M1, and NVFP4's scales.

The magnitudes are 0, ½, 1, 1½, 2, 3, 4 and 6: evenly spaced by ½ below 2, by 1 below 4, by 2 from there. With
Δ(p) the spacing in the octave of p,

    nearest(p) = round(p/Δ)·Δ        x̂ = nearest(clamp(y/s + v, −6, 6))·s

where rounding half to even multiples of Δ is rounding ties to codes whose last bit is zero, which is what hardware and
compressed-tensors do. An offset v, learned or GPTQ's, is in units of the scale, as it is for integers. Scales follow
max|y|/6, rounded:

    NVFP4   groups of 16: s = e4m3(g·max|y|/6)/g, with one global scale g = 448·6/max|Y| in float32
    MXFP4   groups of 32: a power of two (mx.py)

Rounding of scales is straight-through too. What is computed, in which order and precision, is compressed-tensors'.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from compressed_tensors.quantization import DynamicType, QuantizationArgs, QuantizationStrategy
from torch import Tensor

from lrquant.formats.mx import GROUP_SIZE, PowersOfTwo
from lrquant.formats.number_format import Elements, NumberFormat, Range
from lrquant.formats.presets import NamedFormat, register
from lrquant.formats.qparams import largest, width_of

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST_SCALE = 448.0  # of E4M3
SCALE_OF_NOTHING = 0.125  # compressed-tensors' in place of an E4M3 scale of zero


@dataclass(frozen=True)
class E2M1:
    """A sign, two bits of exponent and one of mantissa; a code is these four bits, in a byte."""

    kind: Literal["float"] = "float"
    bits: int = 4
    low: float = -6.0
    high: float = 6.0

    def nearest(self, clamped: Tensor) -> Tensor:
        size, half = clamped.abs(), torch.full_like(clamped, 0.5)
        spacing = torch.where(size < 2, half, torch.where(size < 4, half * 2, half * 4))
        return (clamped / spacing).round() * spacing

    def spacing(self, place: Tensor) -> None:
        return None  # the octaves are few: an offset is in units of the scale

    def encode(self, numbers: Tensor) -> Tensor:
        magnitudes = torch.tensor(MAGNITUDES, dtype=numbers.dtype, device=numbers.device)
        return torch.bucketize(numbers.abs(), magnitudes).to(torch.uint8) + 8 * (numbers < 0).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        numbers = torch.tensor([*MAGNITUDES, *(-size for size in MAGNITUDES)], device=codes.device)
        return numbers[codes.int()]


@dataclass(frozen=True)
class E4M3UnderGlobal:
    """A scale is an E4M3 number over the tensor's global scale, which makes the best of E4M3's range."""

    symmetric = True
    has_global = True
    global_name = "_global_scale"
    follows_steps = False
    takes_gain = True
    unpacked = torch.bfloat16

    def range(
        self,
        low: Tensor,
        high: Tensor,
        elements: Elements,
        floor: float | None,
        dtype: torch.dtype | None,
        global_scale: Tensor | None,
    ) -> Range:
        assert global_scale is not None
        scale, is_open = e4m3_scale(largest(low, high) / (width_of(elements, low) / 2), global_scale)
        return Range(scale, None, is_open, None)

    def stored(self, scale: Tensor, dtype: torch.dtype | None, global_scale: Tensor | None) -> Tensor:
        assert global_scale is not None
        return e4m3_scale(scale, global_scale)[0]

    def global_scale(self, most: Tensor, elements: Elements, dtype: torch.dtype | None) -> Tensor:
        found = LARGEST_SCALE * elements.high / most.float().clamp(min=torch.finfo(torch.float32).tiny)
        return torch.nan_to_num(found, nan=1.0, posinf=1.0).reshape(1)

    def on_disk(self, scale: Tensor, global_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        assert global_scale is not None
        return e4m3(scale * global_scale).to(torch.float8_e4m3fn)

    def bits(self, dtype: torch.dtype) -> int:
        return 8

    def arguments(self) -> dict[str, Any]:
        kinds = {"scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}
        calibrated = {"dynamic": DynamicType.LOCAL, "observer": "static_minmax"}
        return {"strategy": QuantizationStrategy.TENSOR_GROUP} | calibrated | kinds

    def describes(self, args: QuantizationArgs) -> bool:
        return args.symmetric and args.strategy == QuantizationStrategy.TENSOR_GROUP.value


def e4m3_scale(scale: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """(`scale` as E4M3 numbers over `global_scale`, where that is not zero), in float32 or wider."""
    stored = e4m3(scale * global_scale)
    is_open = stored != 0
    return torch.where(is_open, stored, torch.full_like(stored, SCALE_OF_NOTHING)) / global_scale, is_open


def e4m3(scale: Tensor) -> Tensor:
    """The nearest E4M3 numbers to `scale`, none above the largest."""
    return scale.clamp(0, LARGEST_SCALE).to(torch.float8_e4m3fn).to(scale.dtype)


NVFP4 = NumberFormat(E2M1(), E4M3UnderGlobal(), 16)
MXFP4 = NumberFormat(E2M1(), PowersOfTwo(), GROUP_SIZE)

register(NamedFormat("nvfp4", NVFP4, NVFP4))
register(NamedFormat("mxfp4", MXFP4, MXFP4))
