"""Callbacks of a run. Imports nothing heavy, so that the command line can show help at once.

A run calls its callback in this order:

    run_folder                  once, where the run can be resumed
    pass_begins                 of every pass (lrquant.passes), by name
      measured                  mixed precision: after every block
      started                   the blocks: once, before the first
        block_begins            both streams hold what the block receives
          epoch_done            while it learns: after every epoch
          block_decided         it has learned, and still has the original's weights
        block_ends              it is as it stays, and both streams hold its outputs
        block_done              its record is complete
      tuned                     end-to-end tuning: before the first epoch, and after each
    pass_ends

A block that is restored or kept learns nothing, so it has no `epoch_done` and no `block_decided`. A block that an
earlier run finished, and whose outputs are not needed, has only `block_done`. Inspecting a block changes nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrquant.reconstruction.block_event import BlockDecision, BlockEvent
    from lrquant.reconstruction.records import BlockRecord


class Callback:
    """A callback that does nothing. That of the command line shows a progress bar."""

    def run_folder(self, folder: Path) -> None:
        """Files in `folder` are there again when an interrupted run resumes, and are deleted when it ends."""

    def pass_begins(self, name: str) -> None: ...

    def pass_ends(self, name: str) -> None: ...

    def measured(self, done: int, blocks: int) -> None:
        """Mixed precision: errors of `done` of `blocks` blocks have been measured."""

    def started(self, blocks: int, epochs: int) -> None:
        """Before the first of `blocks` blocks; each learns for `epochs` epochs (0: nothing is learned)."""

    def epoch_done(self, block: int, epoch: int, loss: float) -> None:
        """Block number `block` has learned for `epoch` + 1 epochs; `loss` is the mean of the last one."""

    def block_begins(self, view: "BlockEvent") -> None:
        """Both streams hold the block's inputs."""

    def block_decided(self, view: "BlockEvent", decided: "BlockDecision") -> None:
        """The block still has its original weights; x holds its outputs, x̂ its inputs."""

    def block_ends(self, view: "BlockEvent") -> None:
        """The block has its final weights, and both streams hold its outputs."""

    def block_done(self, record: "BlockRecord") -> None:
        """The block's record is complete."""

    def tuned(self, done: int, epochs: int, loss: float | None) -> None:
        """End-to-end tuning: `done` epochs are finished; at 0 there is no loss yet."""


EVENTS = tuple(name for name in vars(Callback) if not name.startswith("_"))


class Callbacks(Callback):
    """Calls several callbacks in order."""

    def __init__(self, *callbacks: Callback) -> None:
        self.callbacks = callbacks


def _tell_all(event: str) -> Callable[..., None]:
    def tell(self: Callbacks, *facts: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(*facts)

    return tell


for _event in EVENTS:
    setattr(Callbacks, _event, _tell_all(_event))
