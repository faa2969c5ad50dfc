"""What each part of LRQuant+ is worth: `python benchmarks/ablation.py`, offline, on the bundled model.

Every row is LRQuant with some parts of LRQuant+ switched on, every column a number format; a cell is the
perplexity's mean and standard deviation over seeds, which decide the calibration samples and their order.
"""

import copy
import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import lrquant
from lrquant.calibration.text import calibration_samples, evaluation_ids
from lrquant.evaluation import perplexity
from lrquant.models import load_model, load_tokenizer

PARTS = ("two_branch", "dynamic_loss", "rotation")
ROWS: dict[str, tuple[str, ...]] = {
    "LRQuant": (),
    "LRQuant+ (all three)": PARTS,
    "+ two branches": ("two_branch",),
    "+ dynamic loss": ("dynamic_loss",),
    "+ rotation": ("rotation",),
    "LRQuant+ without two branches": ("dynamic_loss", "rotation"),
    "LRQuant+ without dynamic loss": ("two_branch", "rotation"),
    "LRQuant+ without rotation": ("two_branch", "dynamic_loss"),
}
FORMATS: dict[str, dict[str, Any]] = {
    "W4A4": {"wbits": 4, "abits": 4},
    "W3A16": {"wbits": 3, "abits": 16},
    "W2A16 g64": {"wbits": 2, "abits": 16, "group_size": 64},
}


def main(
    model: str = "zoo:llama",
    calib: str = "zoo:pydoc",
    eval_ppl: str = "zoo:pydoc",
    seeds: int = 5,
    nsamples: int = 32,
    seqlen: int = 256,
    epochs: int = 5,
    batch_size: int = 4,
    windows: int = 64,
    formats: Annotated[str, typer.Option(help="Only these formats, separated by commas.")] = ",".join(FORMATS),
    rows: Annotated[str, typer.Option(help="Only these rows, by number, as 0,1.")] = "",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Keep every single result here; results already there are not redone.")
    ] = None,
) -> None:
    """Print the ablation of LRQuant+ as a markdown table."""
    err = Console(stderr=True)
    tokenizer, original = load_tokenizer(model), load_model(model, torch.float32)
    test = evaluation_ids(tokenizer, eval_ppl)
    calibration = [calibration_samples(tokenizer, calib, nsamples, seqlen, seed) for seed in range(seeds)]
    names = [name for index, name in enumerate(ROWS) if not rows or str(index) in rows.split(",")]
    if unknown := set(formats.split(",")) - set(FORMATS):
        raise typer.BadParameter(f"unknown formats {', '.join(sorted(unknown))}: there are {', '.join(FORMATS)}")
    columns = {name: FORMATS[name] for name in formats.split(",")}
    settings = [model, calib, eval_ppl, nsamples, seqlen, epochs, batch_size, windows]
    kept = (
        json.loads(json_file.read_text()) if json_file and json_file.is_file() else {"settings": settings, "rows": {}}
    )
    if kept["settings"] != settings:
        raise typer.BadParameter(f"{json_file} holds results of other settings, {kept['settings']}")
    results: dict[str, dict[str, list[float]]] = {row: kept["rows"].get(row, {}) for row in names}
    total = sum(seeds - len(results[row].get(name, [])) for row in names for name in columns)
    done, began = 0, time.perf_counter()
    full = perplexity(original, test, seqlen, windows).value
    for seed in range(seeds):
        for row in names:
            for name, bits in columns.items():
                values = results[row].setdefault(name, [])
                if len(values) > seed:
                    continue
                parts = {part: part in ROWS[row] for part in PARTS}
                recipe = lrquant.Recipe.preset(
                    "lrquant", **bits, **parts, epochs=epochs, batch_size=batch_size, seed=seed, seqlen=seqlen
                )
                quantized = lrquant.quantize(copy.deepcopy(original), recipe, calibration[seed], tokenizer=tokenizer)
                values.append(perplexity(quantized.model, test, seqlen, windows).value)
                done += 1
                left = (time.perf_counter() - began) * (total / done - 1)
                err.print(f"{done}/{total} seed {seed} {row}, {name}: {values[-1]:.3f}, {left / 60:.0f} min left")
                if json_file:
                    merged = kept["rows"] | results
                    json_file.write_text(
                        json.dumps({"settings": settings, "full": full, "rows": merged}, indent=1) + "\n"
                    )
    print(f"| perplexity on {eval_ppl}, mean ± deviation of {seeds} seeds | {' | '.join(columns)} |")
    print("|---|" + "---|" * len(columns))
    print(f"| full precision | {' | '.join([f'{full:.3f}'] * len(columns))} |")
    for row, cells in results.items():
        print(f"| {row} | {' | '.join(cell(cells[name]) for name in columns)} |")


def cell(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {spread:.3f}"


if __name__ == "__main__":
    typer.run(main)
