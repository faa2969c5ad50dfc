"""Who is told while a run goes on; imports nothing, so that the command line can show help at once."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lrquant.reconstruction.block_event import BlockDecision, BlockEvent
    from lrquant.reconstruction.records import BlockRecord


class Callback:
    """Told of progress; this one does nothing. The command line shows a bar."""

    def measured(self, done: int, blocks: int) -> None:
        """Before all else, where bits follow from errors: of so many blocks they are known."""

    def started(self, blocks: int, epochs: int) -> None: ...

    def epoch_done(self, block: int, epoch: int, loss: float) -> None: ...

    def block_begins(self, view: "BlockEvent") -> None:
        """The streams hold what the block is about to receive."""

    def block_decided(self, view: "BlockEvent", decided: "BlockDecision") -> None:
        """The block still has the original's weights; x holds its answer, x̂ what it is about to receive."""

    def block_ends(self, view: "BlockEvent") -> None:
        """The block is as it stays, and both streams hold what it has answered."""

    def block_done(self, record: "BlockRecord") -> None: ...

    def tuned(self, done: int, epochs: int, loss: float | None) -> None:
        """After all blocks, where the whole is learned at last: so many epochs are done, none at first (no loss)."""


class Callbacks(Callback):
    """Tells several callbacks."""

    def __init__(self, *callbacks: Callback) -> None:
        self.callbacks = callbacks

    def measured(self, done: int, blocks: int) -> None:
        for callback in self.callbacks:
            callback.measured(done, blocks)

    def started(self, blocks: int, epochs: int) -> None:
        for callback in self.callbacks:
            callback.started(blocks, epochs)

    def epoch_done(self, block: int, epoch: int, loss: float) -> None:
        for callback in self.callbacks:
            callback.epoch_done(block, epoch, loss)

    def block_begins(self, view: "BlockEvent") -> None:
        for callback in self.callbacks:
            callback.block_begins(view)

    def block_decided(self, view: "BlockEvent", decided: "BlockDecision") -> None:
        for callback in self.callbacks:
            callback.block_decided(view, decided)

    def block_ends(self, view: "BlockEvent") -> None:
        for callback in self.callbacks:
            callback.block_ends(view)

    def block_done(self, record: "BlockRecord") -> None:
        for callback in self.callbacks:
            callback.block_done(record)

    def tuned(self, done: int, epochs: int, loss: float | None) -> None:
        for callback in self.callbacks:
            callback.tuned(done, epochs, loss)
