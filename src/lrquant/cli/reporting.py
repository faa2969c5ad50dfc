"""Functions that commands share to write reports."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrquant.cli import console
from lrquant.runtime.paths import public_name

if TYPE_CHECKING:
    import torch

    from lrquant.entrypoints.results import Quantized
    from lrquant.evaluation import Perplexity, TaskResults
    from lrquant.report.observer import Observer
    from lrquant.report.run import Metric

DEMO_REPORT = "lrquant-demo-report.html"


def command_line() -> str:
    """The command line without absolute paths, because reports may be published."""
    parted = [argument.rpartition("=") for argument in sys.argv[1:]]
    return shlex.join(["lrquant", *(f"{option}{equals}{public_name(value)}" for option, equals, value in parted)])


def metrics_of(
    before: dict[str, "Perplexity"], after: dict[str, "Perplexity"], tasks: "TaskResults | None" = None
) -> list["Metric"]:
    """Everything that was measured, for the report's summary."""
    from lrquant.entrypoints.reporting import perplexity_metrics
    from lrquant.report.run import Metric

    found = perplexity_metrics(before, after)
    for task, values in tasks.results.items() if tasks else ():
        accuracy = _accuracy(values)
        if accuracy is not None:
            found.append(Metric(name=f"accuracy {task}", before=None, after=accuracy, better="higher"))
    return found


def _accuracy(values: dict[str, Any]) -> float | None:
    """A task's length-normalised accuracy, or its plain one; None where it is measured otherwise."""
    for name in ("acc_norm,none", "acc,none"):
        if isinstance(values.get(name), int | float):
            return float(values[name])
    return None


def leave_demo_report(
    quantized: "Quantized",
    observer: "Observer",
    model: str,
    device: "torch.device",
    metrics: Sequence["Metric"],
    rows: Sequence[tuple[str, dict[str, float], dict[str, Any]]],  # (method, its figures, sizes and seconds)
    save_dir: Path | None,
) -> Path:
    """A demo's report beside its checkpoint, or, where that is not kept, in the current folder."""
    from lrquant.entrypoints.reporting import Subject, report_quantized
    from lrquant.report.run import Compared

    compared = [
        Compared(
            method=method,
            values=values,
            bits_per_weight=row["bits_per_weight"],
            megabytes=row["megabytes"],
            seconds=row["seconds"],
        )
        for method, values, row in rows
    ]
    output = None if save_dir else Path(DEMO_REPORT)
    with console.status("Drawing the report"):
        subject = Subject(model, command_line(), device)
        return report_quantized(quantized, observer, subject, metrics=metrics, compared=compared, output=output)
