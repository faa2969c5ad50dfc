"""Who is told while a run goes on; imports nothing, so that the command line can show help at once."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lrquant.reconstruction.records import BlockRecord
    from lrquant.reconstruction.view import BlockView, Decided


class Watcher:
    """Told of progress; this one does nothing. The command line shows a bar."""

    def measured(self, done: int, blocks: int) -> None:
        """Before all else, where bits follow from errors: of so many blocks they are known."""

    def started(self, blocks: int, epochs: int) -> None: ...

    def epoch_done(self, block: int, epoch: int, loss: float) -> None: ...

    def block_begins(self, view: "BlockView") -> None:
        """The streams hold what the block is about to receive."""

    def block_decided(self, view: "BlockView", decided: "Decided") -> None:
        """The block still has the original's weights; x holds its answer, x̂ what it is about to receive."""

    def block_ends(self, view: "BlockView") -> None:
        """The block is as it stays, and both streams hold what it has answered."""

    def block_done(self, record: "BlockRecord") -> None: ...

    def tuned(self, done: int, epochs: int, loss: float | None) -> None:
        """After all blocks, where the whole is learned at last: so many epochs are done, none at first (no loss)."""


class Watchers(Watcher):
    """Tells several watchers."""

    def __init__(self, *watchers: Watcher) -> None:
        self.watchers = watchers

    def measured(self, done: int, blocks: int) -> None:
        for watcher in self.watchers:
            watcher.measured(done, blocks)

    def started(self, blocks: int, epochs: int) -> None:
        for watcher in self.watchers:
            watcher.started(blocks, epochs)

    def epoch_done(self, block: int, epoch: int, loss: float) -> None:
        for watcher in self.watchers:
            watcher.epoch_done(block, epoch, loss)

    def block_begins(self, view: "BlockView") -> None:
        for watcher in self.watchers:
            watcher.block_begins(view)

    def block_decided(self, view: "BlockView", decided: "Decided") -> None:
        for watcher in self.watchers:
            watcher.block_decided(view, decided)

    def block_ends(self, view: "BlockView") -> None:
        for watcher in self.watchers:
            watcher.block_ends(view)

    def block_done(self, record: "BlockRecord") -> None:
        for watcher in self.watchers:
            watcher.block_done(record)

    def tuned(self, done: int, epochs: int, loss: float | None) -> None:
        for watcher in self.watchers:
            watcher.tuned(done, epochs, loss)
