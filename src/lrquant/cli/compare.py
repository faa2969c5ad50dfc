"""`lrquant compare`: a table of several results."""

from pathlib import Path
from typing import Annotated

import typer

from lrquant.cli import console
from lrquant.cli.info import describe
from lrquant.cli.quantize import JsonFile
from lrquant.errors import UsageError


def compare(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR DIR...", help="Quantized checkpoints.")],
    json: JsonFile = None,
) -> None:
    """Print a table of several quantized checkpoints: format, size, quality, time."""
    console.check_output(json)
    if len(directories) < 2:
        raise UsageError("give at least two folders to compare; lrquant info DIR describes one")

    from lrquant.report.findings import hardest_block, own_error
    from lrquant.report.run import FOLDER, RUN_FILE, Run, read_run

    facts = [describe(directory) for directory in directories]
    runs: list[Run | None] = [
        read_run(directory) if (directory / FOLDER / RUN_FILE).is_file() else None for directory in directories
    ]
    metrics = list(dict.fromkeys(metric.name for run in runs if run for metric in run.metrics))
    values = [{metric.name: metric for metric in run.metrics} if run else {} for run in runs]
    rows = [
        ["base model", *(fact.base or "–" for fact in facts)],
        ["method", *(fact.method or "–" for fact in facts)],
        ["format", *(fact.format for fact in facts)],
        ["size", *(console.megabytes(fact.bytes) for fact in facts)],
        ["bits per quantized weight", *(f"{fact.bits_per_weight:.2f}" for fact in facts)],
    ]
    for name in metrics:
        rows.append([name, *(f"{found[name].after:.3f}" if name in found else "–" for found in values)])
        originals = [found[name].before if name in found else None for found in values]
        if any(value is not None for value in originals):
            rows.append([f"  {name}, original", *("–" if value is None else f"{value:.3f}" for value in originals)])
    hardest = [hardest_block(run) if run else None for run in runs]
    rows += [
        ["hardest block", *(f"{b.index} ({own_error(b):.1%} off)" if b else "–" for b in hardest)],
        ["time", *(f"{run.seconds:.1f} s" if run else "–" for run in runs)],
    ]
    console.table(f"{len(directories)} checkpoints", ["", *map(str, directories)], rows)
    console.write_json(
        json,
        {
            str(directory): fact.as_dict() | {"metrics": {name: metric.after for name, metric in found.items()}}
            for directory, fact, found in zip(directories, facts, values, strict=True)
        },
    )
