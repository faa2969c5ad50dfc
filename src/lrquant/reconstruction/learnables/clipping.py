"""Learnable weight clipping (LWC): per group of weights two logits γ, β with M ← σ(γ)·max(W), m ← σ(β)·min(W).

Both start at 4 (OmniQuant §3.2).
"""

from collections.abc import Mapping

from torch import Tensor

from lrquant.recipe import Recipe
from lrquant.reconstruction.fixed_parameters import BlockParameters
from lrquant.reconstruction.learnables.learnable import Learnable, Learnables, Start
from lrquant.reconstruction.learnables.rates import clipping_rate
from lrquant.transforms import Edits

CLIP_LOGIT = 4.0  # sigmoid(4) = 0.982: nearly the whole range
LOW, HIGH = "clip_low", "clip_high"


class Clipping(Learnable):
    """`linear.clip_low` and `.clip_high`: (`scale_shape`, 1), logits of the factors on minimum and maximum."""

    parts = (LOW, HIGH)

    def enabled(self, recipe: Recipe) -> bool:
        return recipe.lwc

    def start(self, fixed: BlockParameters, start: Start) -> Learnables:
        learnables: Learnables = {}
        for linear in fixed.linears:
            weight = fixed.weight(linear)
            shape = (*fixed.format_of(linear).scale_shape(weight.shape), 1)
            learnables |= {f"{linear}.{end}": weight.new_full(shape, CLIP_LOGIT) for end in self.parts}
        return learnables

    def record(self, fixed: BlockParameters, learnables: Mapping[str, Tensor], edits: Edits) -> None:
        for linear, part, logits in self.owned(learnables):
            ends = edits.clip_low if part == LOW else edits.clip_high
            ends[linear] = logits.sigmoid()

    def rate(self, recipe: Recipe, steps: int) -> float:
        return clipping_rate(recipe, steps)

    def kept(self, learnables: Mapping[str, Tensor], linear: str) -> tuple[Tensor, Tensor] | None:
        """Shares of a linear's minima and maxima that clipping keeps, as its logits; None: all of them."""
        low, high = (learnables.get(f"{linear}.{end}") for end in self.parts)
        return None if low is None or high is None else (low.sigmoid(), high.sigmoid())


LEARNABLE = Clipping()
