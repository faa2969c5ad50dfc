"""Providers for test-time adaptation: blocks keep their parameters, or are learned again where that helps.

Two providers of a block's parameters (reconstruction/run.py) replace those that restore and learn. `Present.keep`
returns the values of a quantized checkpoint. `Present.relearn` learns from the original's weights, and keeps the
checkpoint's values if those are better.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lrquant.reconstruction.block_reconstruction import Learn, Rival
from lrquant.reconstruction.run import BlockOutcome, BlockTask, ParameterProvider


@dataclass(frozen=True)
class Present:
    """A quantized model whose blocks `relearned` are to be learned again."""

    blocks: Sequence[Mapping[str, Tensor]]  # dequantized parameters of every block, by name
    relearned: frozenset[int]
    static_scales: Sequence[Mapping[str, Tensor]] = field(default_factory=list)  # FrozenBlock.static_scales, if any

    def rival(self, index: int) -> Rival:
        """What block number `index` is at present."""
        return Rival(self.blocks[index], self.static_scales[index] if self.static_scales else {})

    def providers(self) -> Sequence[ParameterProvider]:
        return self.keep, self.relearn

    def keep(self, task: BlockTask) -> BlockOutcome | None:
        """The block with the checkpoint's parameters; None: it is to be learned again."""
        if task.place.index in self.relearned:
            return None
        _, flat = task.forward.advance_full_precision(task.full_precision)
        present = self.rival(task.place.index)
        return BlockOutcome(present.parameters, present.static_scales, flat)

    def relearn(self, task: BlockTask) -> BlockOutcome:
        """The block learned again, or with the checkpoint's parameters if those are better."""
        return Learn().learned(task, self.rival(task.place.index))
