"""Everything printed for people: results on standard output, progress and errors on standard error."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lrquant.errors import UsageError
from lrquant.watching import Watcher

if TYPE_CHECKING:
    from lrquant.reconstruction import BlockRecord

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def error(line: str) -> None:
    err.print("[bold red]Error:[/] ", end="")
    err.print(" ".join(line.split()), markup=False, soft_wrap=True)


def note(line: str) -> None:
    out.print(f"Note: {line}", markup=False, soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose first column is text and whose others are numbers."""
    shown = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        shown.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        shown.add_row(*row)
    out.print(shown)


def megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def check_json_path(path: Path | None) -> None:
    """Raise early when a result file could not be written at the end."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UsageError(f"--json {path}: {'this is a folder' if path.is_dir() else 'its folder does not exist'}")


def write_json(path: Path | None, values: dict[str, Any]) -> None:
    """Write figures to `path`, whole or not at all."""
    if path is None:
        return
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(values, indent=1) + "\n")
    temporary.replace(path)


class BlockProgress(Watcher):
    """A watcher of the engine: a bar with time left and the loss, or a plain line per block without a terminal."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=err,
            transient=True,
        )
        self.blocks = self.steps = 0

    def started(self, blocks: int, epochs: int) -> None:
        self.blocks, self.steps = blocks, max(1, epochs)
        if err.is_terminal:
            self.bar.start()
        self.task = self.bar.add_task(self.title, total=blocks * self.steps, loss="")

    def epoch_done(self, block: int, epoch: int, loss: float) -> None:
        self.bar.update(self.task, completed=block * self.steps + epoch + 1, loss=f"block {block} loss {loss:.4g}")

    def block_done(self, record: "BlockRecord") -> None:
        done = record.index + 1
        self.bar.update(self.task, completed=done * self.steps)
        if not err.is_terminal:
            err.print(
                f"{self.title}: block {done}/{self.blocks}, loss {record.initial_loss:.4g} -> {record.final_loss:.4g} "
                f"({record.outcome}), cosine {record.cosine:.5f}, {record.seconds:.1f} s",
                soft_wrap=True,
            )
        if done == self.blocks:
            self.stop()

    def stop(self) -> None:
        if self.bar.live.is_started:
            self.bar.stop()


@contextmanager
def watching(title: str) -> Iterator[BlockProgress]:
    """A `BlockProgress` that leaves the terminal clean whatever happens."""
    progress = BlockProgress(title)
    try:
        yield progress
    finally:
        progress.stop()


@contextmanager
def status(line: str) -> Iterator[None]:
    """A spinner while something short goes on; a plain line without a terminal."""
    began = time.perf_counter()
    if err.is_terminal:
        with err.status(line):
            yield
    else:
        yield
        err.print(f"{line}: {time.perf_counter() - began:.1f} s", soft_wrap=True)
