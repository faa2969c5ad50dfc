"""Uniform affine grids: which integers, which scale and zero point for given extremes.

For a group of values with clipped extremes m ≤ 0 ≤ M, signed n-bit integers q ∈ [−2ⁿ⁻¹, 2ⁿ⁻¹ − 1]:

    asymmetric   s = (M − m)/(2ⁿ − 1)          z = round(clamp(qmin − m/s))
    symmetric    s = max(|m|, M)·2/(2ⁿ − 1)    z = 0

The operations, their order and their dtype are compressed-tensors', so that scales and zero points agree
with it bit for bit. Grids of four-bit floats have the same description and other scales: lrquant.formats.fp4.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from lrquant.formats import fp4 as floats

WEIGHT_SCALE_FLOOR = 1e-5
Numbers = Literal["int", "nvfp4", "mxfp4"]


@dataclass(frozen=True)
class Grid:
    """Signed integers of `bits` bits; `group_size` values share a scale (None: a whole row does).

    Or, as `numbers` says, four-bit floats with NVFP4's or MXFP4's scales, which are symmetric.
    """

    bits: int
    symmetric: bool = False
    group_size: int | None = None
    numbers: Numbers = "int"

    @classmethod
    def of(cls, args: QuantizationArgs) -> "Grid":
        if args.type == "float":
            return cls(args.num_bits, True, args.group_size, "nvfp4" if args.strategy == "tensor_group" else "mxfp4")
        return cls(args.num_bits, args.symmetric, args.group_size if args.strategy == "group" else None)

    @property
    def is_float(self) -> bool:
        return self.numbers != "int"

    @property
    def has_whole(self) -> bool:
        """Whether a scale for the whole tensor stands behind those of the groups."""
        return self.numbers == "nvfp4"

    @property
    def unit(self) -> float:
        """What an integer one stands for: floats are kept as multiples of ½."""
        return 0.5 if self.is_float else 1.0

    @property
    def low(self) -> int:
        return -int(floats.LARGEST) if self.is_float else -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        return int(floats.LARGEST) if self.is_float else 2 ** (self.bits - 1) - 1

    @property
    def steps(self) -> int:
        return self.high - self.low


class Range(NamedTuple):
    """Scale and zero point of each group, and which of their clamps are open (for the backward)."""

    scale: Tensor  # (..., groups, 1)
    zero: Tensor | None  # same shape, whole numbers; None when symmetric
    scale_open: Tensor  # bool: the floor did not replace the scale
    zero_open: Tensor | None  # bool: the zero point was not clamped


def find_range(
    low: Tensor,
    high: Tensor,
    grid: Grid,
    floor: float | None,
    scale_dtype: torch.dtype | None,
    whole: Tensor | None = None,  # (1,), the scale g of the whole tensor
) -> Range:
    """Scale and zero point for groups whose extremes are `low` ≤ 0 ≤ `high`, each (..., groups, 1).

    `floor` is the least scale; None replaces only a scale of zero, by the dtype's epsilon, which is
    compressed-tensors' rule. `scale_dtype` rounds the scale to what the checkpoint can hold. Neither is for floats,
    whose scales have a format of their own.
    """
    if grid.is_float:
        return _range_of_floats(torch.maximum(-low, high), grid, whole)
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


def _range_of_floats(most: Tensor, grid: Grid, whole: Tensor | None) -> Range:
    if whole is None:
        return Range(floats.power_of_two_scale(most), None, most != 0, None)
    steps = most.new_full((), grid.steps)
    scale, is_open = floats.e4m3_scale(most / (steps / 2), whole)
    return Range(scale, None, is_open, None)
