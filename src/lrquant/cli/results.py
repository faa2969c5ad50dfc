"""The results of a finished run, as a table for people and as values for programs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrquant.cli import console

if TYPE_CHECKING:
    from lrquant.entrypoints.quantize import Quantized
    from lrquant.evaluation import Perplexity
    from lrquant.reconstruction.coverage import Coverage


def show(
    quantized: "Quantized",
    measured: dict[str, "Perplexity"],
    adapted: dict[str, "Perplexity"],
    original: dict[str, "Perplexity"] | None = None,
    page: Path | None = None,
) -> None:
    """Print the results of a finished run."""
    sizes = quantized.sizes
    rows = [
        ["saved to", str(quantized.saved_to)],
        ["size", f"{console.megabytes(sizes.checkpoint_bytes)}, {sizes.compared}"],
        ["bits per quantized weight", f"{sizes.bits_per_weight:.3f}"],
        *coverage_rows(quantized.coverage),
        ["time", f"{quantized.seconds:.1f} s"],
        ["peak memory", console.megabytes(quantized.peak_memory_bytes)],
    ]
    for name, result in measured.items():
        before = f", {original[name].value:.3f} before" if original else ""
        rows.append([f"perplexity {name}", f"{result.value:.3f}{before} ({_windows(result)})"])
    rows += [[f"perplexity {name}, after adaptation", f"{result.value:.3f}"] for name, result in adapted.items()]
    rows += _served_by(quantized)
    if page:
        rows.append(["report", str(page)])
    recipe = quantized.recipe
    warning = quantized.coverage.warning() if quantized.coverage is not None else None
    if warning:
        console.say(warning)
    console.table(f"{recipe.method} {recipe.format_name}", ["", ""], rows)
    for line in quantized.notes:
        if line != warning:
            console.note(line)


def _windows(result: "Perplexity") -> str:
    return f"{result.windows} windows of {result.seqlen}" + (", each from BOS" if result.bos else "")


def coverage_rows(coverage: "Coverage | None") -> list[list[str]]:
    """Which share of a model is quantized, and what is not."""
    if coverage is None:
        return []
    return [["quantized", coverage.summary()], *([f"  {what}", how] for what, how in coverage.rows())]


def _served_by(quantized: "Quantized") -> list[list[str]]:
    """The commands that serve the result."""
    from lrquant.runtimes import commands, format_of_config

    if quantized.saved_to is None or not quantized.saved_to.is_dir():  # a folder that was only for the run
        return []
    config = json.loads((quantized.saved_to / "config.json").read_text())
    started = commands(format_of_config(config), str(quantized.saved_to))
    if not started:
        return [["served by", "no program; transformers simulates it (lrquant info explains why)"]]
    return [[f"in {name}", command] for name, command in started.items()]


def figures(
    quantized: "Quantized",
    measured: dict[str, "Perplexity"],
    adapted: dict[str, "Perplexity"],
    original: dict[str, "Perplexity"] | None = None,
) -> dict[str, Any]:
    """Everything that `show` prints, and the records of the blocks, for programs."""
    import platform

    import torch

    from lrquant import __version__

    sizes = quantized.sizes
    return {
        "method": quantized.recipe.method,
        "format": quantized.recipe.format_name,
        "saved_to": str(quantized.saved_to),
        "seconds": quantized.seconds,
        "peak_memory_bytes": quantized.peak_memory_bytes,
        "checkpoint_bytes": sizes.checkpoint_bytes,
        "bf16_bytes": sizes.bf16_bytes,
        "ratio_to_bf16": sizes.bf16_bytes / sizes.checkpoint_bytes,
        "ratio_to_original": sizes.ratio,
        "bits_per_weight": sizes.bits_per_weight,
        "coverage": quantized.coverage.as_dict() if quantized.coverage is not None else None,
        "perplexity": {name: result.value for name, result in measured.items()},
        "original_perplexity": {name: result.value for name, result in (original or {}).items()},
        "adapted_perplexity": {name: result.value for name, result in adapted.items()},
        "evaluation": {name: {"windows": r.windows, "seqlen": r.seqlen, "bos": r.bos} for name, r in measured.items()},
        "notes": quantized.notes,
        "blocks": [record.as_dict() for record in quantized.records],
        "recipe": quantized.recipe.model_dump(),
        "versions": {"lrquant": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
