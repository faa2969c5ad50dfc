"""Four-bit floating point, E2M1, whose groups' scales are numbers of few bits themselves.

The magnitudes are 0, ½, 1, 1½, 2, 3, 4 and 6: evenly spaced by ½ below 2, by 1 below 4, by 2 from there. With
Δ(p) the spacing in the octave of p,

    nearest(p) = round(p/Δ)·Δ        x̂ = nearest(clamp(y/s + v, −6, 6))·s

where rounding half to even multiples of Δ is rounding ties to codes whose last bit is zero, which is what hardware and
compressed-tensors do. An offset v, learned or compensating, is in units of the scale, as it is for integers. Scales
follow max|y|/6, rounded:

    NVFP4   groups of 16: s = e4m3(g·max|y|/6)/g, with one g = 448·6/max|Y| for the whole tensor, in float32
    MXFP4   groups of 32: s = 2^(⌊log2 max|y|⌋ − 2), twice that from 1.75 powers of two on

Rounding of scales is straight-through too. What is computed, in which order and precision, is compressed-tensors'.
"""

import torch
from torch import Tensor

LARGEST = 6.0
LARGEST_SCALE = 448.0  # of E4M3
SCALE_OF_NOTHING = 0.125  # compressed-tensors' in place of an E4M3 scale of zero
_MANTISSA = 23  # bits of float32's


def nearest(p: Tensor) -> Tensor:
    """The nearest number to each of `p`, which is within ±6."""
    size, half = p.abs(), torch.full_like(p, 0.5)
    spacing = torch.where(size < 2, half, torch.where(size < 4, half * 2, half * 4))
    return (p / spacing).round() * spacing


def scale_of_tensor(most: Tensor) -> Tensor:
    """g of a tensor whose largest magnitude is `most`: (1,) float32. It maps the largest scale to E4M3's largest."""
    found = LARGEST_SCALE * LARGEST / most.float().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.nan_to_num(found, nan=1.0, posinf=1.0).reshape(1)


def e4m3_scale(scale: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """(`scale` as E4M3 numbers over g = `whole`, where that is not zero), in float32 or wider."""
    stored = e4m3(scale * whole)
    is_open = stored != 0
    return torch.where(is_open, stored, torch.full_like(stored, SCALE_OF_NOTHING)) / whole, is_open


def e4m3(scale: Tensor) -> Tensor:
    """The nearest E4M3 numbers to `scale`, none above the largest."""
    return scale.clamp(0, LARGEST_SCALE).to(torch.float8_e4m3fn).to(scale.dtype)


def power_of_two_scale(most: Tensor) -> Tensor:
    """MXFP4's scale of groups whose largest magnitudes are `most`."""
    # A quarter more carries mantissas from 1.75 on into the exponent.
    exponent = ((most.float().view(torch.int32) + (1 << (_MANTISSA - 2))) >> _MANTISSA) - 2
    return _power_of_two(exponent, most.dtype)


def nearest_power_of_two(scale: Tensor) -> Tensor:
    """`scale` > 0 as a power of two: halfway between two of them, the upper one."""
    return _power_of_two((scale.float().view(torch.int32) + (1 << (_MANTISSA - 1))) >> _MANTISSA, scale.dtype)


def _power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^(exponent − 127) from E8M0's codes, at least 0; one where `dtype` has no such number."""
    bits = torch.where(exponent >= 1, exponent << _MANTISSA, torch.full_like(exponent, 1 << (_MANTISSA - 1)))
    scale = bits.view(torch.float32).to(dtype)
    return torch.where(scale == 0, torch.ones_like(scale), scale)
