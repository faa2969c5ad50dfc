"""Microscaling (OCP MX): a group of 32 numbers and a scale that is a power of two, a byte for its exponent (E8M0).

For elements of which 2ᵏ is the largest power of two,

    s = 2^(⌊log2 max|y|⌋ − k), twice that where max|y| is 1.75 powers of two or more

so that few values exceed the range; these saturate. That is compressed-tensors' rule, bit for bit. Rounding of
scales is straight-through.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from lrquant.formats.number_format import Elements, Range
from lrquant.formats.qparams import largest

GROUP_SIZE = 32
_MANTISSA = 23  # bits of float32's


@dataclass(frozen=True)
class PowersOfTwo:
    """A scale of eight bits, all of them exponent."""

    symmetric = True
    has_global = False
    global_name = ""
    follows_steps = False
    takes_gain = False  # there are hardly any of them near one
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
        most = largest(low, high)
        return Range(power_of_two_scale(most, elements.high), None, most != 0, None)

    def stored(self, scale: Tensor, dtype: torch.dtype | None, global_scale: Tensor | None) -> Tensor:
        return nearest_power_of_two(scale)

    def global_scale(self, most: Tensor, elements: Elements, dtype: torch.dtype | None) -> Tensor:
        raise TypeError("this format has no global scale")

    def on_disk(self, scale: Tensor, global_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        return (scale.float().view(torch.int32) >> _MANTISSA).to(torch.uint8)

    def bits(self, dtype: torch.dtype) -> int:
        return 8

    def arguments(self) -> dict[str, Any]:
        return {"scale_dtype": torch.uint8, "zp_dtype": torch.uint8}

    def describes(self, args: QuantizationArgs) -> bool:
        return args.symmetric and args.scale_dtype == torch.uint8 and args.group_size == GROUP_SIZE


def power_of_two_scale(most: Tensor, high: float) -> Tensor:
    """The scale of groups whose largest magnitudes are `most`, of elements up to `high`."""
    # A quarter more carries mantissas from 1.75 on into the exponent.
    exponent = ((most.float().view(torch.int32) + (1 << (_MANTISSA - 2))) >> _MANTISSA) - math.floor(math.log2(high))
    return _power_of_two(exponent, most.dtype)


def nearest_power_of_two(scale: Tensor) -> Tensor:
    """`scale` > 0 as a power of two: halfway between two of them, the upper one."""
    return _power_of_two((scale.float().view(torch.int32) + (1 << (_MANTISSA - 1))) >> _MANTISSA, scale.dtype)


def _power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^(exponent − 127) from E8M0's codes, at least 0; one where `dtype` has no such number."""
    bits = torch.where(exponent >= 1, exponent << _MANTISSA, torch.full_like(exponent, 1 << (_MANTISSA - 1)))
    scale = bits.view(torch.float32).to(dtype)
    return torch.where(scale == 0, torch.ones_like(scale), scale)
