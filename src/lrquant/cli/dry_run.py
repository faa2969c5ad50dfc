"""`lrquant quantize --dry-run`: the estimated size, memory and time of a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrquant.cli import console
from lrquant.cli.results import coverage_rows

if TYPE_CHECKING:
    from lrquant.recipe import Recipe


def show_estimate(
    model: str,
    recipe: "Recipe",
    save_dir: Path,
    *,
    activations: Any,
    device: str,
    trust_remote_code: bool,
    json: Path | None,
) -> None:
    """Estimate a run and print the result as a table, or write it to `json`."""
    from lrquant.entrypoints.estimate import estimate

    _, ranks = console.ranks()
    if not console.speaks():
        return
    with console.status("Trying one block"):
        found = estimate(
            model,
            recipe,
            device,
            activations=activations,
            trust_remote_code=trust_remote_code,
            ranks=ranks,
            save_dir=save_dir,
        )
    where = f"{found.activations}, {console.megabytes(found.activation_bytes)}"
    rows = [
        ["blocks", f"{found.blocks}, with {found.block_parameters / 1e6:,.1f} M parameters"],
        ["parameters", f"{found.parameters / 1e6:,.1f} M"],
        ["to read", console.megabytes(found.read_bytes)],
        ["to write", console.megabytes(found.checkpoint_bytes)],
        ["temporarily, during the run", console.megabytes(found.work_bytes)],
        ["hidden states", f"{where}{' each process' if ranks > 1 else ''}"],
        ["peak memory", f"{console.megabytes(found.peak_memory_bytes)}{' each process' if ranks > 1 else ''}"],
        ["time", f"{_duration(found.seconds)}, {found.step_seconds:.3f} s a step"],
    ]
    rows += coverage_rows(found.coverage)
    console.table(f"{recipe.method} {recipe.format_name}, not run", ["", ""], rows)
    for line in found.notes:
        console.note(line)
    console.write_json(json, {"model": model, **found.as_dict(), "recipe": recipe.model_dump()})


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{seconds / 3600:.1f} h"
