"""Integers of 2 to 8 bits, signed: −2ⁿ⁻¹ to 2ⁿ⁻¹ − 1."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lrquant.formats.number_format import NumberFormat
from lrquant.formats.presets import CACHES, HIGH_PRECISION_BITS, NamedFormat, know, register
from lrquant.formats.qparams import Affine, Static, Symmetric

BITS = range(2, 9)


@dataclass(frozen=True)
class Integers:
    """Signed integers of `bits` bits, in units of their scale; a code is the integer, in int8."""

    bits: int
    kind: Literal["int"] = "int"

    @property
    def low(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def nearest(self, clamped: Tensor) -> Tensor:
        return clamped.round()

    def spacing(self, place: Tensor) -> None:
        return None

    def encode(self, numbers: Tensor) -> Tensor:
        return numbers.to(torch.int8)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.float()


def integers(bits: int, symmetric: bool = False, group_size: int | None = None) -> NumberFormat:
    """Integers of `bits` bits; `group_size` values of a row share a scale (None: a whole row does)."""
    return NumberFormat(Integers(bits), Symmetric() if symmetric else Affine(), group_size)


class _AnyIntegers(NamedFormat):
    """Integers of whichever width, groups and symmetry a recipe chooses."""

    chooses = True

    def for_weights(self, bits: int, group_size: int | None, symmetric: bool) -> NumberFormat:
        return integers(bits, symmetric, group_size)

    def for_inputs(self, bits: int, symmetric: bool) -> NumberFormat:
        return integers(bits, symmetric)

    @property
    def presets(self) -> dict[str, dict[str, Any]]:
        weights: dict[str, Any] = {"symmetric": True, "quantize_attention": False}
        both = weights | {"activations_symmetric": True}
        alone: dict[str, Any] = {"quantize_attention": False, "abits": HIGH_PRECISION_BITS}
        return {
            "w4a16-g128": weights | {"wbits": 4, "abits": HIGH_PRECISION_BITS, "group_size": 128},
            "w8a8": both | {"wbits": 8, "abits": 8},
            "w4a8": both | {"wbits": 4, "abits": 8},
            "w4a4": both | {"wbits": 4, "abits": 4},
            "w3a16-g128": alone | {"wbits": 3, "group_size": 128},
            "w2a16-g64": alone | {"wbits": 2, "group_size": 64},
        }


for _bits in BITS:
    know(integers(_bits), integers(_bits, symmetric=True))
CACHES["int8"] = NumberFormat(Integers(8), Static())
know(CACHES["int8"])
register(_AnyIntegers("int", integers(4), integers(8)))
