"""What the engine tells of finished blocks, and what it can be told of those that an earlier run finished.

The engine knows nothing of files. It asks a journal whether a block is finished; a finished one is run through
with the parameters that the journal gives, which costs two forward passes and leaves both streams as learning it
would have. The journal here remembers nothing; the one on disk is `lrquant.checkpoints.journal`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from lrquant.reconstruction.parameters import FrozenBlock
from lrquant.reconstruction.records import BlockRecord
from lrquant.transforms.statistics import ChannelStatistics


@dataclass
class FinishedBlock:
    """All that is left of a block when it is done, on the CPU. Names are within the block."""

    learnables: dict[str, Tensor]
    statistics: dict[str, ChannelStatistics]  # of every linear's input
    record: BlockRecord
    flat_inputs: tuple[str, ...]  # linears that see (tokens, width)
    added_biases: tuple[str, ...]  # modules that got a bias for a shift
    input_scales: dict[str, Tensor] = field(default_factory=dict)  # FrozenBlock.input_scales


class Journal:
    """Remembers nothing: every block is to be done, and frozen blocks stay in memory."""

    keeps_frozen = False  # whether frozen blocks need not be kept in memory besides

    def open(self, blocks: int) -> None:
        """Called once, before the first block."""

    def finished(self, place: int) -> bool:
        """Whether block number `place` need not be done again."""
        return False

    def restore(self, place: int, block: nn.Module) -> tuple[FinishedBlock, Mapping[str, Tensor]] | None:
        """The finished block and its dequantized parameters; None: it is to be done after all.

        `block` still holds the original's parameters.
        """
        return None

    def summary(self, place: int) -> FinishedBlock:
        """As `restore`, of a block that nothing needs to pass through any more."""
        raise LookupError(f"block {place} was not finished")

    def block_done(self, place: int, path: str, block: nn.Module, finished: FinishedBlock, frozen: FrozenBlock) -> None:
        """`block`, at `path` in the model, is learned and frozen."""
