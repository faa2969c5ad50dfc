"""LRQuant+'s rotation vector: a gain on the rows of a dequantized weight, which folds into its scales.

Ŵ' = diag(r)·Ŵ with r = 1 at the start. It multiplies weights that start at one, so it keeps the papers' rate however
few the steps.
"""

from collections.abc import Mapping

from torch import Tensor

from lrquant.recipe import Recipe
from lrquant.reconstruction.fixed_parameters import BlockParameters
from lrquant.reconstruction.learnables.learnable import Learnable, Learnables, Start
from lrquant.reconstruction.learnables.rates import rotation_rate
from lrquant.transforms import Edits


class RotationVector(Learnable):
    """`linear.rotation`: (out, 1)."""

    parts = ("rotation",)

    def enabled(self, recipe: Recipe) -> bool:
        return recipe.rotation_vectors and recipe.rotation_rank == 1

    def start(self, fixed: BlockParameters, start: Start) -> Learnables:
        return {f"{name}.rotation": fixed.weight(name).new_ones(len(fixed.weight(name)), 1) for name in fixed.linears}

    def record(self, fixed: BlockParameters, learnables: Mapping[str, Tensor], edits: Edits) -> None:
        for linear, _, rotation in self.owned(learnables):
            edits.gain[linear] = rotation[..., None]

    def rate(self, recipe: Recipe, steps: int) -> float:
        return rotation_rate(recipe, steps)


LEARNABLE = RotationVector()
