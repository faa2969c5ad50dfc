"""Options that every working command has: how much is said, and where it is kept."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lrquant.cli import console
from lrquant.errors import LrquantError, Terminated, UsageError

COLLECTIVE = ("quantize", "evaluate")  # what several processes do together

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors, no progress.")]
LogFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also write everything that is said to the end of FILE.")
]


class Stopped(LrquantError):
    """Control-C or SIGTERM as an error: typer ends the program at a KeyboardInterrupt, and its line would be lost."""

    def __init__(self, stopped: KeyboardInterrupt) -> None:
        super().__init__(str(stopped) or "interrupted")
        terminated = isinstance(stopped, Terminated) or isinstance(stopped.__cause__, Terminated)
        self.exit_code = 143 if terminated else 130


def interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, after whose interruption the program still says what is kept."""

    @functools.wraps(command)
    def wrapped(*values: Any, **given: Any) -> None:
        try:
            command(*values, **given)
        except KeyboardInterrupt as error:
            raise Stopped(error) from error

    return wrapped


def with_output_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with --quiet and --log-file, in force while it runs."""
    extra = {"quiet": (Quiet, False), "log_file": (LogFile, None)}

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        quiet, log_file = (given.pop(name) for name in extra)
        if console.ranks()[1] > 1 and command.__name__ not in COLLECTIVE:
            raise UsageError(
                f"{command.__name__} works in one process: torchrun is for lrquant quantize and lrquant eval"
            )
        with console.output(quiet, log_file):
            interruptible(command)(**given)

    signature = inspect.signature(command)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in extra.items()
    ]
    wrapped.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *added])  # type: ignore[attr-defined]
    wrapped.__annotations__ = command.__annotations__ | {name: kind for name, (kind, _) in extra.items()}
    return wrapped
