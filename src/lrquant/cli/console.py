"""All output for people: results on standard output, progress and errors on standard error.

`--quiet` shows only results and errors. `--log-file` receives everything as plain lines with the time. rich decides
about colour and progress bars: none without a terminal, no colour with NO_COLOR.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lrquant.errors import LrquantError, UsageError
from lrquant.reconstruction.callbacks import Callback
from lrquant.runtime.paths import check_writable, reason, write_file

if TYPE_CHECKING:
    from lrquant.reconstruction.records import BlockRecord

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
log = logging.getLogger("lrquant.console")
log.propagate = False
log.addHandler(logging.NullHandler())


def ranks() -> tuple[int, int]:
    """(this process's number, how many there are) of those that torchrun started for one run; else (0, 1)."""
    world = int(os.environ.get("WORLD_SIZE", "1")) if "MASTER_ADDR" in os.environ else 1
    return (int(os.environ.get("RANK", "0")), world) if world > 1 else (0, 1)


def speaks() -> bool:
    """Whether this process prints and writes: the first rank does."""
    return ranks()[0] == 0


@contextmanager
def output(quiet: bool, log_file: Path | None) -> Iterator[None]:
    """A context in which progress and notes are hidden if `quiet`, and every line is also appended to `log_file`.

    Raises:
        UsageError: the file cannot be written.
    """
    before, log.level = (progress.quiet, log.level), logging.INFO
    progress.quiet, out.quiet = quiet or not speaks(), not speaks()
    log_file = log_file if speaks() else None
    handler: logging.Handler = logging.NullHandler()
    if log_file is not None:
        try:
            handler = logging.FileHandler(log_file, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--log-file {log_file}: cannot be written ({error.strerror})") from None
        handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk ends the log, not the run
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    except BaseException as error:
        log.info("Error: %s", " ".join(str(error).split()) or type(error).__name__)
        raise
    finally:
        log.removeHandler(handler)
        handler.close()
        progress.quiet, log.level = before
        out.quiet = False


class _Progress:
    """Progress and remarks, on standard error; silent while `quiet`."""

    quiet = False

    @property
    def moves(self) -> bool:
        """Whether bars may be drawn."""
        return err.is_terminal and not self.quiet

    def line(self, text: str) -> None:
        """A progress line for output without a terminal; the log always has it."""
        log.info("%s", text)
        if not self.quiet and not err.is_terminal:
            err.print(text, markup=False, soft_wrap=True)


progress = _Progress()


def error(line: str) -> None:
    """Print an error as one line on standard error."""
    rank, world = ranks()
    err.print("[bold red]Error:[/] ", end="")
    if world > 1:
        line = f"rank {rank}: {line}"
    err.print(" ".join(line.split()), markup=False, soft_wrap=True)


def say(line: str) -> None:
    """Print a line that is not a result."""
    log.info("%s", line)
    if not progress.quiet:
        out.print(line, markup=False, soft_wrap=not out.is_terminal)  # a terminal breaks lines between words


def note(line: str) -> None:
    """Print a note as one line."""
    say(f"Note: {line}")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = (0,)) -> None:
    """A table; columns in `words` hold text, the others numbers."""
    shown = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        shown.add_column(column, justify="left" if index in words else "right", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    out.print(shown)
    log.info("%s", title)
    for row in rows:
        log.info(
            "%s", ", ".join(f"{column}: {cell}" if column else cell for column, cell in zip(columns, row, strict=True))
        )


def megabytes(count: float) -> str:
    """`count` bytes in MB or GB, for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def check_output(path: Path | None, option: str = "--json") -> None:
    """Raise early if the file given by `option` could not be written at the end."""
    if path is not None and speaks():
        check_writable(path, option)


def write_json(path: Path | None, values: dict[str, Any]) -> None:
    """Write figures to `path`.

    Raises:
        LrquantError: it cannot be written; the results are printed instead.
    """
    if path is None or not speaks():
        return
    text = json.dumps(values, indent=1) + "\n"
    try:
        write_file(path, text.encode())
    except OSError as error:
        out.print(text, markup=False, soft_wrap=True, end="")
        raise LrquantError(
            f"--json {path}: cannot be written ({reason(error)}); the results are printed above"
        ) from None


class BlockProgress(Callback):
    """A callback of the engine: a bar with time left and the loss, or a plain line per block without a terminal."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar = _bar(TextColumn("{task.fields[loss]}"))
        self.blocks = self.steps = 0

    def measured(self, done: int, blocks: int) -> None:
        if done == 1:
            if progress.moves:
                self.bar.start()
            self.measuring = self.bar.add_task("Measuring quantization errors", total=blocks, loss="")
        self.bar.update(self.measuring, completed=done, visible=done < blocks)
        progress.line(f"{self.title}: {done}/{blocks} blocks measured")

    def started(self, blocks: int, epochs: int) -> None:
        self.blocks, self.steps = blocks, max(1, epochs)
        if progress.moves:
            self.bar.start()
        self.task = self.bar.add_task(self.title, total=blocks * self.steps, loss="")

    def epoch_done(self, block: int, epoch: int, loss: float) -> None:
        self.bar.update(self.task, completed=block * self.steps + epoch + 1, loss=f"block {block} loss {loss:.4g}")

    def block_done(self, record: "BlockRecord") -> None:
        done = record.index + 1
        self.bar.update(self.task, completed=done * self.steps)
        progress.line(
            f"{self.title}: block {record.index} ({done}/{self.blocks}), loss {record.initial_loss:.4g} -> "
            f"{record.final_loss:.4g} ({record.outcome_words}), cosine {record.cosine:.5f}, {record.seconds:.1f} s"
        )
        if done == self.blocks:
            self.stop()

    def tuned(self, done: int, epochs: int, loss: float | None) -> None:
        if loss is None:
            if progress.moves:
                self.bar.start()
            self.bar.update(self.task, visible=False)
            self.tuning = self.bar.add_task(f"{self.title}, the whole", total=epochs, loss="")
            return
        self.bar.update(self.tuning, completed=done, loss=f"divergence {loss:.4g}")
        progress.line(f"{self.title}: end-to-end tuning, epoch {done}/{epochs}, divergence {loss:.4g}")
        if done == epochs:
            self.stop()

    def stop(self) -> None:
        if self.bar.live.is_started:
            self.bar.stop()


def _bar(*extra: TextColumn) -> Progress:
    """A bar with time left that vanishes when it is done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        *extra,
        console=err,
        transient=True,
    )


@contextmanager
def watching(title: str) -> Iterator[BlockProgress]:
    """A `BlockProgress` that leaves the terminal clean whatever happens."""
    watched = BlockProgress(title)
    try:
        yield watched
    finally:
        watched.stop()


@contextmanager
def counting(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar for work that reports (number just done, total); without a terminal, a plain line at the end.

    Several totals, such as those of successive texts, add up.
    """
    began = time.perf_counter()
    bar = _bar()
    task = bar.add_task(title, total=0)
    left = 0

    def told(done: int, total: int) -> None:
        nonlocal left
        if left == 0:  # a new piece
            left = total
            bar.update(task, total=(bar.tasks[0].total or 0) + total)
            if progress.moves:
                bar.start()  # now that there is something to count
        left -= done
        bar.advance(task, done)

    try:
        yield told
    finally:
        bar.stop()
    progress.line(f"{title}: {time.perf_counter() - began:.1f} s")


@contextmanager
def status(line: str) -> Iterator[None]:
    """A spinner during short work; a plain line without a terminal."""
    began = time.perf_counter()
    if progress.moves:
        with err.status(line):
            yield
    else:
        yield
    progress.line(f"{line}: {time.perf_counter() - began:.1f} s")
