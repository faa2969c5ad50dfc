"""Uniform affine grids: which integers, which scale and zero point for given extremes.

For a group of values with clipped extremes m ≤ 0 ≤ M, signed n-bit integers q ∈ [−2ⁿ⁻¹, 2ⁿ⁻¹ − 1]:

    asymmetric   s = (M − m)/(2ⁿ − 1)          z = round(clamp(qmin − m/s))
    symmetric    s = max(|m|, M)·2/(2ⁿ − 1)    z = 0

The operations, their order and their dtype are compressed-tensors', so that scales and zero points agree
with it bit for bit.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

WEIGHT_SCALE_FLOOR = 1e-5


@dataclass(frozen=True)
class Grid:
    """Signed integers of `bits` bits; `group_size` values share a scale (None: a whole row does)."""

    bits: int
    symmetric: bool = False
    group_size: int | None = None

    @classmethod
    def of(cls, args: QuantizationArgs) -> "Grid":
        return cls(args.num_bits, args.symmetric, args.group_size if args.strategy == "group" else None)

    @property
    def low(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def steps(self) -> int:
        return 2**self.bits - 1


class Range(NamedTuple):
    """Scale and zero point of each group, and which of their clamps are open (for the backward)."""

    scale: Tensor  # (..., groups, 1)
    zero: Tensor | None  # same shape, whole numbers; None when symmetric
    scale_open: Tensor  # bool: the floor did not replace the scale
    zero_open: Tensor | None  # bool: the zero point was not clamped


def find_range(low: Tensor, high: Tensor, grid: Grid, floor: float | None, scale_dtype: torch.dtype | None) -> Range:
    """Scale and zero point for groups whose extremes are `low` ≤ 0 ≤ `high`, each (..., groups, 1).

    `floor` is the least scale; None replaces only a scale of zero, by the dtype's epsilon, which is
    compressed-tensors' rule. `scale_dtype` rounds the scale to what the checkpoint can hold.
    """
    steps = low.new_full((), grid.steps)  # no plain number: CUDA would multiply by its reciprocal, which rounds twice
    scale = torch.maximum(-low, high) / (steps / 2) if grid.symmetric else (high - low) / steps
    if scale_dtype is not None:
        scale = scale.to(scale_dtype).to(low.dtype)
    least = floor if floor is not None else torch.finfo(scale.dtype).eps
    scale_open = scale >= floor if floor is not None else scale != 0
    scale = torch.where(scale_open, scale, torch.full_like(scale, least))
    if scale_dtype is not None:
        scale = scale.to(scale_dtype).to(low.dtype)
    if grid.symmetric:
        return Range(scale, None, scale_open, None)
    zero = grid.low - low / scale
    zero_open = (zero >= grid.low) & (zero <= grid.high)
    return Range(scale, zero.clamp(grid.low, grid.high).round(), scale_open, zero_open)
