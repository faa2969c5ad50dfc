"""The report of a finished run, written by `quantize`, `adapt` and the command line."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from lrquant.entrypoints.results import Adapted, Quantized
from lrquant.evaluation import Perplexity
from lrquant.report.observer import Observer
from lrquant.report.run import Compared, Metric, Run, save_run
from lrquant.runtime.paths import public_name
from lrquant.runtime.profile import timed


def perplexity_metrics(before: dict[str, Perplexity], after: dict[str, Perplexity]) -> list[Metric]:
    """Perplexities of the original and of the result, text by text."""
    return [
        Metric(
            name=f"perplexity {name}",
            before=before[name].value if name in before else None,
            after=result.value,
            detail=f"{result.windows} windows of {result.seqlen} tokens" + (", each from BOS" if result.bos else ""),
            windows_before=list(before[name].window_losses) if name in before else [],
            windows_after=list(result.window_losses) if name in before else [],
        )
        for name, result in after.items()
    ]


@dataclass(frozen=True)
class Subject:
    """The subject of a report: the model's name, the command, and the device."""

    model: str
    command: str
    device: torch.device
    reference: str | None = None  # the full-precision model that an adapted one was compared to


def report_quantized(
    quantized: Quantized,
    observer: Observer,
    subject: Subject,
    *,
    metrics: Sequence[Metric] = (),
    compared: Sequence[Compared] = (),
    output: Path | None = None,
) -> Path:
    """Write the report of `quantized` beside its checkpoint, the page to `output` when given."""
    assert quantized.saved_to is not None
    sizes, recipe = quantized.sizes, quantized.recipe
    return _leave(
        quantized.saved_to,
        observer,
        Run(
            kind="demo" if compared else "quantize",
            model=public_name(subject.model),
            method=recipe.method,
            format=recipe.format_name,
            command=subject.command,
            recipe=recipe.model_dump(mode="json") | {"calibration": public_name(recipe.calibration)},
            seconds=quantized.seconds,
            peak_memory_bytes=quantized.peak_memory_bytes,
            profile=quantized.profile,
            checkpoint_bytes=sizes.checkpoint_bytes,
            original_bytes=sizes.original_bytes,
            bits_per_weight=sizes.bits_per_weight,
            metrics=list(metrics),
            compared=list(compared),
            notes=[*quantized.notes, *([quantized.coverage.sentence()] if quantized.coverage is not None else [])],
            **_circumstances(observer, subject.device),
        ),
        output=output,
    )


def report_adapted(adapted: Adapted, observer: Observer, subject: Subject, *, metrics: Sequence[Metric] = ()) -> Path:
    """Write the report of `adapted` beside its checkpoint."""
    recipe = adapted.recipe
    return _leave(
        adapted.saved_to,
        observer,
        Run(
            kind="adapt",
            model=public_name(subject.model),
            reference=subject.reference and public_name(subject.reference),
            method=recipe.method,
            format=recipe.format_name,
            command=subject.command,
            recipe=recipe.model_dump(mode="json") | {"calibration": public_name(recipe.calibration)},
            seconds=adapted.seconds,
            metrics=list(metrics),
            notes=[f"Adapted blocks: {', '.join(map(str, adapted.blocks))}; all other blocks are unchanged."],
            **_circumstances(observer, subject.device),
        ),
    )


def _circumstances(observer: Observer, device: torch.device) -> dict[str, Any]:
    from lrquant import __version__

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": f"{device} ({name})",
        "samples_looked_at": observer.looked_at,
        "blocks": observer.blocks,
        "versions": {"lrquant": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


@timed("report")
def _leave(directory: Path, observer: Observer, run: Run, *, output: Path | None = None) -> Path:
    from lrquant.report.page import write_report  # matplotlib, only when something is drawn

    save_run(directory, run, observer.measurements)
    return write_report(directory, output)
