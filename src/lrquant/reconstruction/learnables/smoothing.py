"""Smoothing: a scale S > 0 for every channel of an equivalent transformation, and a shift δ where biases can hold it.

X' = (X − δ)/S, W' = W·diag(S) (LRQuant §3; lrquant.transforms). They move at the rate of smoothing, and S stays at
least 1e-2.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from lrquant.recipe import Recipe
from lrquant.reconstruction.fixed_parameters import BlockParameters
from lrquant.reconstruction.learnables.learnable import Learnable, Learnables, Start
from lrquant.reconstruction.learnables.rates import smoothing_rate
from lrquant.transforms import Edits
from lrquant.transforms.equivalence import SCALE, SHIFT, record_scales
from lrquant.transforms.smoothing import LEAST_SCALE


class Smoothing(Learnable):
    """`transformation.scale` and `.shift`: (channels,) each, as many as the transformation has (lrquant.transforms)."""

    parts = (SCALE, SHIFT)
    on_grid = False
    least = MappingProxyType({SCALE: LEAST_SCALE})

    def enabled(self, recipe: Recipe) -> bool:
        return recipe.let

    def start(self, fixed: BlockParameters, start: Start) -> Learnables:
        """From the statistics. A bias that was only added for a shift counts as none: its shift starts at zero."""
        added = {f"{module}.bias" for module in start.added_biases}
        params = {name: tensor for name, tensor in fixed.tensors.items() if name not in added}
        learnables = {}
        for equivalence in fixed.equivalences:
            first = equivalence.initial(params, start.statistics, start.recipe.init, start.recipe.alpha)
            for part in (SCALE, SHIFT) if equivalence.name in start.shifted else (SCALE,):
                learnables[f"{equivalence.name}.{part}"] = first[part].clone(memory_format=torch.contiguous_format)
        return learnables

    def record(self, fixed: BlockParameters, learnables: Mapping[str, Tensor], edits: Edits) -> None:
        record_scales(fixed.tensors, fixed.equivalences, learnables, edits)

    def rate(self, recipe: Recipe, steps: int) -> float:
        return smoothing_rate(recipe, steps)

    def scales(self, learnables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scales by transformation."""
        return {owner: tensor for owner, part, tensor in self.owned(learnables) if part == SCALE}


LEARNABLE = Smoothing()
