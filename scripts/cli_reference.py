"""Write docs/cli.md from the command line itself: `python scripts/cli_reference.py`. A test compares the two."""

import inspect
from itertools import groupby
from pathlib import Path
from typing import Any

import typer

from lrquant.cli.main import app
from lrquant.cli.settings import Listed

TARGET = Path(__file__).parents[1] / "docs" / "cli.md"
PUBLISHED = """
## The published commands

`python main.py` and `python generate_act_scale_shift.py`, at the root of the repository, take the command lines of the
LRQuant papers as they stand; `--help` lists their options, and [methods](methods.md) says what they set.
"""
ALL = "`--help` shows the common options, `--help-all` every option; they are all here."


def reference() -> str:
    """Every command and option of `lrquant`, in the panels in which help shows them."""
    program: Any = typer.main.get_command(app)
    context = program.make_context("lrquant", [], resilient_parsing=True)
    lines = ["# `lrquant`", program.help, options(program, context)]
    for name, command in program.commands.items():
        lines.append(described(f"lrquant {name}", command.whole(context) if isinstance(command, Listed) else command))
    return "\n\n".join(lines) + "\n" + PUBLISHED


def described(name: str, command: Any) -> str:
    """One command: what it does, how it is called, its options."""
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    more = [ALL] if any(each.name == "help_all" for each in command.params) else []
    return "\n\n".join(
        [
            f"## `{name}`",
            inspect.cleandoc(command.help),
            f"```console\n$ {usage}\n```",
            *more,
            options(command, context),
        ]
    )


def options(command: Any, context: Any) -> str:
    """A list of the command's parameters for each panel."""
    parameters = command.get_params(context)
    for each in parameters:
        each.hidden = False
    lines = []
    for panel, members in groupby(parameters, key=lambda each: getattr(each, "rich_help_panel", None)):
        if panel:
            lines.append(f"### {panel}")
        records = [each.get_help_record(context) for each in members]
        lines.append("\n".join(f"* `{name}`: {text}" if text else f"* `{name}`" for name, text in records))
    return "\n\n".join(lines)


if __name__ == "__main__":
    TARGET.write_text(reference())
