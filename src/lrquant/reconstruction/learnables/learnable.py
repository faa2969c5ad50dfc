"""The Learnable class: initial values, effect on a block's parameters, learning rate and bounds.

A learnable is one short file beside this one that ends in `LEARNABLE = …`; adding a file is enough. Its tensors are
vectors or matrices of any shape, named `owner.part`, where the owner is a linear or a transformation of the block and
`parts` are the learnable's own names. Files of learned parameters and journals use the same names.
`docs/adding-a-learnable.md` adds one step by step.

The effect of its tensors is recorded as `Edits` (lrquant.transforms.equivalence), which one pure function applies to
the block: factors on rows and columns, clips, gains and rounding offsets, replaced weights, factors on dequantized
weights, or any other parameter of the block.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

from torch import Tensor

from lrquant.recipe import Recipe
from lrquant.reconstruction.fixed_parameters import BlockParameters
from lrquant.transforms import Edits
from lrquant.transforms.statistics import ChannelStatistics

Learnables = dict[str, Tensor]  # `owner.part` → values


@dataclass(frozen=True)
class Start:
    """Information for the initial values of a block's learnables."""

    recipe: Recipe
    block_index: int = 0
    statistics: Mapping[str, ChannelStatistics] = field(default_factory=dict)  # of every linear's input
    shifted: Sequence[str] = ()  # transformations that learn a shift
    added_biases: Sequence[str] = ()  # modules that got a bias for it, zero so far


class Learnable(ABC):
    """One kind of learnable. Objects have no state: tensors are passed in.

    Attributes:
        parts: names of its tensors for one owner.
        on_grid: whether it is only used if weights are quantized.
        least: lower bounds of parts, enforced after every step.
        large: whether it has a value for every weight; finished blocks in memory do not keep it.
    """

    parts: ClassVar[tuple[str, ...]]
    on_grid: ClassVar[bool] = True
    least: ClassVar[Mapping[str, float]] = MappingProxyType({})
    large: ClassVar[bool] = False

    @abstractmethod
    def enabled(self, recipe: Recipe) -> bool:
        """Whether blocks learn it under `recipe`."""

    @abstractmethod
    def start(self, fixed: BlockParameters, start: Start) -> Learnables:
        """First values by `owner.part`, on the block's device, in float32."""

    @abstractmethod
    def record(self, fixed: BlockParameters, learnables: Mapping[str, Tensor], edits: Edits) -> None:
        """Record in `edits` the effect of its own tensors, `learnables`. Differentiable."""

    @abstractmethod
    def rate(self, recipe: Recipe, steps: int) -> float:
        """AdamW's learning rate for `steps` steps per block."""

    def owned(self, learnables: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
        """(owner, part, values) of those tensors that are its own."""
        for name, tensor in learnables.items():
            owner, _, part = name.rpartition(".")
            if part in self.parts:
                yield owner, part, tensor

    def of(self, learnables: Mapping[str, Tensor]) -> Learnables:
        """Those tensors of `learnables` that are its own."""
        return {f"{owner}.{part}": tensor for owner, part, tensor in self.owned(learnables)}

    def left_out(self, learnables: Mapping[str, Tensor]) -> Learnables:
        """`learnables` without those that are its own."""
        own = self.of(learnables)
        return {name: tensor for name, tensor in learnables.items() if name not in own}
