"""Scales and zero points of uniform quantization, for given extremes.

For a group of values with clipped extremes m ≤ 0 ≤ M, and numbers from `low` to `high`, steps = high − low:

    Affine       s = (M − m)/steps             z = round(clamp(low − m/s))
    Symmetric    s = max(|m|, M)·2/steps       z = 0

The operations, their order and their dtype are compressed-tensors', so that scales and zero points agree with it bit
for bit. A tensor may also have one scale that calibration finds:

    Static       s = max|X|·2/steps over the calibration samples
"""

from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor

from lrquant.formats.number_format import Elements, Range

WEIGHT_SCALE_FLOOR = 1e-5


def largest(low: Tensor, high: Tensor) -> Tensor:
    """The largest magnitude of groups with these extremes."""
    return torch.maximum(-low, high)


def width_of(elements: Elements, like: Tensor) -> Tensor:
    """high − low as a tensor: CUDA would multiply by a plain number's reciprocal, which rounds twice."""
    return like.new_full((), elements.high - elements.low)


@dataclass(frozen=True)
class _Plain:
    """Scales that are floating-point numbers of the checkpoint's own precision."""

    symmetric = True
    has_global = False
    global_name = ""
    follows_steps = True
    takes_gain = True
    unpacked: None = None

    def stored(self, scale: Tensor, dtype: torch.dtype | None, global_scale: Tensor | None) -> Tensor:
        return scale if dtype is None else scale.to(dtype).to(scale.dtype)

    def global_scale(self, most: Tensor, elements: Elements, dtype: torch.dtype | None) -> Tensor:
        raise TypeError("this format has no global scale")

    def on_disk(self, scale: Tensor, global_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        return scale.to(dtype)

    def bits(self, dtype: torch.dtype) -> int:
        return 8 * dtype.itemsize

    def arguments(self) -> dict[str, Any]:
        return {}

    def _kept(self, scale: Tensor, floor: float | None, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """(`scale` as it is stored and not below `floor`, whether it stayed what it was)."""
        scale = self.stored(scale, dtype, None)
        least = floor if floor is not None else torch.finfo(scale.dtype).eps
        is_open = scale >= floor if floor is not None else scale != 0
        return self.stored(torch.where(is_open, scale, torch.full_like(scale, least)), dtype, None), is_open


@dataclass(frozen=True)
class Symmetric(_Plain):
    """The largest magnitude is the range's end; zero is zero."""

    def range(
        self,
        low: Tensor,
        high: Tensor,
        elements: Elements,
        floor: float | None,
        dtype: torch.dtype | None,
        global_scale: Tensor | None,
    ) -> Range:
        scale, is_open = self._kept(largest(low, high) / (width_of(elements, low) / 2), floor, dtype)
        return Range(scale, None, is_open, None)

    def describes(self, args: QuantizationArgs) -> bool:
        own = args.strategy not in (QuantizationStrategy.TENSOR.value, QuantizationStrategy.TENSOR_GROUP.value)
        return args.symmetric and own and args.scale_dtype is None


@dataclass(frozen=True)
class Affine(_Plain):
    """The minimum is the least number, the maximum the largest."""

    symmetric = False

    def range(
        self,
        low: Tensor,
        high: Tensor,
        elements: Elements,
        floor: float | None,
        dtype: torch.dtype | None,
        global_scale: Tensor | None,
    ) -> Range:
        scale, is_open = self._kept((high - low) / width_of(elements, low), floor, dtype)
        zero = elements.low - low / scale
        zero_open = (zero >= elements.low) & (zero <= elements.high)
        return Range(scale, zero.clamp(elements.low, elements.high).round(), is_open, zero_open)

    def describes(self, args: QuantizationArgs) -> bool:
        return not args.symmetric and args.scale_dtype is None


@dataclass(frozen=True)
class Static(_Plain):
    """One scale for all inputs of a linear, which calibration finds: nothing is measured at run time."""

    has_global = True
    global_name = "_scale"

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
        scale = global_scale.to(low.dtype).expand_as(low)
        return Range(scale, None, torch.zeros_like(scale, dtype=torch.bool), None)

    def global_scale(self, most: Tensor, elements: Elements, dtype: torch.dtype | None) -> Tensor:
        scale = most.float() / (width_of(elements, most.float()) / 2)
        return self._kept(scale, None, dtype)[0].to(dtype or torch.float32).reshape(1)

    def arguments(self) -> dict[str, Any]:
        return {"strategy": QuantizationStrategy.TENSOR, "dynamic": False, "observer": "static_minmax"}

    def describes(self, args: QuantizationArgs) -> bool:
        return args.symmetric and args.strategy == QuantizationStrategy.TENSOR.value and not args.dynamic
