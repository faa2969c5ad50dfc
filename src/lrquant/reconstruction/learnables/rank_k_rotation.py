"""The papers' general rotation, of rank k > 1: a dequantized weight times R = r₁ r₂, element by element.

Scales cannot hold R, so the result is stored dense (Recipe.stored_scheme): a research option. R starts at one for every
rank: the additional columns of r₁ start small and random, and the additional rows of r₂ at zero.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lrquant.recipe import Recipe
from lrquant.reconstruction.fixed_parameters import BlockParameters
from lrquant.reconstruction.learnables.learnable import Learnable, Learnables, Start
from lrquant.reconstruction.learnables.rates import rotation_rate
from lrquant.transforms import Edits

LEFT, RIGHT = "rotation_left", "rotation_right"


class RankKRotation(Learnable):
    """`linear.rotation_left`: (out, k), and `.rotation_right`: (k, in)."""

    parts = (LEFT, RIGHT)

    def enabled(self, recipe: Recipe) -> bool:
        return recipe.rotation_vectors and recipe.rotation_rank > 1

    def start(self, fixed: BlockParameters, start: Start) -> Learnables:
        generator = torch.Generator().manual_seed(start.recipe.seed + start.block_index)
        rank = start.recipe.rotation_rank
        learnables: Learnables = {}
        for linear in fixed.linears:
            weight = fixed.weight(linear)
            left = torch.randn(weight.shape[0], rank, generator=generator).to(weight) * 0.01
            right = weight.new_zeros(rank, weight.shape[1])
            left[:, 0], right[0] = 1.0, 1.0
            learnables |= {f"{linear}.{LEFT}": left, f"{linear}.{RIGHT}": right}
        return learnables

    def record(self, fixed: BlockParameters, learnables: Mapping[str, Tensor], edits: Edits) -> None:
        for linear, part, left in self.owned(learnables):
            if part == LEFT:
                edits.multiplier[linear] = left @ learnables[f"{linear}.{RIGHT}"]

    def rate(self, recipe: Recipe, steps: int) -> float:
        return rotation_rate(recipe, steps)


LEARNABLE = RankKRotation()
