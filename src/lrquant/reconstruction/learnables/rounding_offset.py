"""Learned rounding: an offset v for every weight, added on the grid before it is rounded, q = round(w/s + z + v).

GPTQ's rounding is also expressed as offsets (lrquant.formats.gptq).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lrquant.recipe import Recipe
from lrquant.reconstruction.fixed_parameters import BlockParameters
from lrquant.reconstruction.learnables.learnable import Learnable, Learnables, Start
from lrquant.reconstruction.learnables.rates import rounding_rate
from lrquant.transforms import Edits


class RoundingOffset(Learnable):
    """`linear.offset`: (out, in), zero at the start, which rounds to the nearest integer."""

    parts = ("offset",)
    large = True

    def enabled(self, recipe: Recipe) -> bool:
        return recipe.rounding == "learned"

    def start(self, fixed: BlockParameters, start: Start) -> Learnables:
        return self.named({linear: torch.zeros_like(fixed.weight(linear)) for linear in fixed.linears})

    def named(self, offsets: Mapping[str, Tensor]) -> Learnables:
        """Offsets by linear as learnables."""
        return {f"{linear}.offset": offset for linear, offset in offsets.items()}

    def record(self, fixed: BlockParameters, learnables: Mapping[str, Tensor], edits: Edits) -> None:
        for linear, _, offset in self.owned(learnables):
            edits.offset[linear] = offset

    def rate(self, recipe: Recipe, steps: int) -> float:
        return rounding_rate(recipe, steps)


LEARNABLE = RoundingOffset()
