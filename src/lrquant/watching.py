"""Who is told while a run goes on; imports nothing, so that the command line can show help at once."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lrquant.reconstruction.records import BlockRecord


class Watcher:
    """Told of progress; this one does nothing. The command line shows a bar."""

    def started(self, blocks: int, epochs: int) -> None: ...

    def epoch_done(self, block: int, epoch: int, loss: float) -> None: ...

    def block_done(self, record: "BlockRecord") -> None: ...
