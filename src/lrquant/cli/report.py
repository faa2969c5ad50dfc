"""`lrquant report`: write the report of a run again, or compare several runs."""

from pathlib import Path
from typing import Annotated

import typer

from lrquant.cli import console
from lrquant.errors import UsageError

COMPARISON = Path("lrquant-comparison.html")


def report(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders written by quantize, adapt or demo.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", show_default=f"report.html in DIR; {COMPARISON} for several"),
    ] = None,
) -> None:
    """Write the report of one run again, or one page that compares several runs."""
    for directory in directories:
        if not directory.is_dir():
            raise UsageError(f"{directory}: no such folder")
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise UsageError(f"--output {output}: {'this is a folder' if output.is_dir() else 'its folder does not exist'}")

    from lrquant.report.page import write_comparison, write_report

    with console.status("Drawing the report"):
        if len(directories) == 1:
            page = write_report(directories[0], output)
        else:
            page = write_comparison(directories, output or COMPARISON)
    console.out.print(str(page), markup=False, soft_wrap=True)
