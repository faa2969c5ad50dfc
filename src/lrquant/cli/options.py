"""Options that several commands share, and the output options of all commands that do work."""

import functools
import inspect
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lrquant.cli import console
from lrquant.cli.completion import model_names
from lrquant.cli.tracking import Tracker
from lrquant.errors import LrquantError, Terminated, UsageError


class Dtype(StrEnum):
    """Precisions of a model's computation."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A hub name, a local folder, or zoo:NAME.", autocompletion=model_names),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Precision = Annotated[
    Dtype, typer.Option(help="Precision of the computation; auto: float32 on CPUs, bfloat16 elsewhere.")
]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all results to FILE as JSON.")]
Tasks = Annotated[
    str | None,
    typer.Option(metavar="A,B,…", help="lm-eval tasks: piqa,arc_easy,…; zoo:cloze and zoo:shapes-vqa are offline."),
]
NumFewshot = Annotated[
    int | None, typer.Option(min=0, help="Few-shot examples in a task's prompt.", show_default="the task's own")
]
Limit = Annotated[int | None, typer.Option(min=1, help="At most N items of each task.")]
Report = Annotated[bool, typer.Option("--report/--no-report", help="Write report.html into the result's folder.")]
LogTo = Annotated[
    list[Tracker] | None, typer.Option(help="Also log scalars to tensorboard or wandb, if installed; can be repeated.")
]
PushToHub = Annotated[
    str | None, typer.Option(metavar="USER/NAME", help="Upload the result to this repository on the hub.")
]
Private = Annotated[bool, typer.Option("--private", help="Create a private repository on the hub.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Allow code that comes with the model to run.")]

COLLECTIVE = ("quantize", "evaluate")  # what several processes do together

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only results and errors, no progress.")]
LogFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Also append all output to FILE.")]


class Stopped(LrquantError):
    """Control-C or SIGTERM as an error: typer ends the program at a KeyboardInterrupt, and its line would be lost."""

    def __init__(self, stopped: KeyboardInterrupt) -> None:
        super().__init__(str(stopped) or "interrupted")
        terminated = isinstance(stopped, Terminated) or isinstance(stopped.__cause__, Terminated)
        self.exit_code = 143 if terminated else 130


def interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, wrapped so that an interruption still reports what is kept."""

    @functools.wraps(command)
    def wrapped(*values: Any, **given: Any) -> None:
        try:
            command(*values, **given)
        except KeyboardInterrupt as error:
            raise Stopped(error) from error

    return wrapped


def with_output_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the options --quiet and --log-file."""
    extra = {"quiet": (Quiet, False), "log_file": (LogFile, None)}

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        quiet, log_file = (given.pop(name) for name in extra)
        if console.ranks()[1] > 1 and command.__name__ not in COLLECTIVE:
            raise UsageError(
                f"{command.__name__} runs in one process; use torchrun only with lrquant quantize and lrquant eval"
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
