"""Codes of at most four bits, two in a byte: the first of a pair in the low half."""

import torch
from torch import Tensor


def to_nibbles(codes: Tensor) -> Tensor:
    """(out, in) codes, signed or not, as bytes (out, in / 2); `in` is even."""
    low, high = (codes[:, start::2].to(torch.uint8) & 15 for start in (0, 1))
    return low | high << 4


def from_nibbles(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The codes (out, in) behind `to_nibbles`: with a sign in `dtype` int8, without one in uint8."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return (codes.to(dtype) ^ 8) - 8 if dtype == torch.int8 else codes
