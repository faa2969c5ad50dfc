"""The factor of end-to-end tuning: multiplies a stored scale or vector once all blocks are done, and starts at one.

It acts on finished blocks (passes/end_to_end). Only the resulting scales and vectors are saved.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lrquant.recipe import Recipe
from lrquant.reconstruction.fixed_parameters import BlockParameters
from lrquant.reconstruction.learnables.learnable import Learnable, Learnables, Start
from lrquant.transforms import Edits


class EndToEndFactor(Learnable):
    """`block.parameter.factor`: as the scales (out, groups, 1) or the vector that it multiplies."""

    parts = ("factor",)

    def enabled(self, recipe: Recipe) -> bool:
        return False  # by no block

    def start(self, fixed: BlockParameters, start: Start) -> Learnables:
        return {}

    def record(self, fixed: BlockParameters, learnables: Mapping[str, Tensor], edits: Edits) -> None:
        """Nothing: it multiplies what is frozen already."""

    def rate(self, recipe: Recipe, steps: int) -> float:
        return recipe.tuning_lr

    def ones(self, block_index: int, bases: Mapping[str, Tensor]) -> Learnables:
        """Factors of one for the values `bases` of a block."""
        return {self._name(block_index, name): torch.ones_like(base) for name, base in bases.items()}

    def applied(self, factors: Learnables, block_index: int, name: str, base: Tensor, stored: torch.dtype) -> Tensor:
        """`base` times its factor, rounded as the checkpoint stores it."""
        return (base * factors[self._name(block_index, name)]).to(stored)

    def _name(self, block_index: int, name: str) -> str:
        return f"{block_index}.{name}.{self.parts[0]}"


LEARNABLE = EndToEndFactor()
