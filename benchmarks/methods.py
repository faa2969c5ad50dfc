"""Perplexity and seconds of every method on one model: mean and spread over seeds, as a markdown table.

    python benchmarks/methods.py --wbits 4 --abits 4 --seeds 5
    python benchmarks/methods.py --wbits 2 --abits 16 --group-size 64 --methods "rtn omniquant lrquant"
    python benchmarks/methods.py --methods "lrquant lrquant:init=smoothquant lrquant:loss=mse,shift=on"

A method may carry changes to its recipe after a colon. Every method sees the same samples.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

import lrquant
from grow_outliers import grow_outliers
from lrquant import Recipe

TEXTS = ("zoo:pydoc", "zoo:pycode")


def recipe_of(method: str, settings: dict[str, Any], learning: dict[str, Any]) -> Recipe:
    """The preset `name` or `name:key=value,…` with this benchmark's settings."""
    name, _, changes = method.partition(":")
    recipe = Recipe.preset(name, **settings)
    if recipe.learns:
        recipe = recipe.changed(**learning)
    pairs = (change.partition("=") for change in changes.split(",") if change)
    return recipe.changed(**{key: yaml.safe_load(value) for key, _, value in pairs})


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def main(
    model: str = "zoo:llama",
    methods: str = "rtn smoothquant omniquant lrquant lrquant+",
    wbits: int = 4,
    abits: int = 4,
    group_size: int | None = None,
    nsamples: int = 32,
    seqlen: int = 256,
    epochs: int = 5,
    batch_size: int = 4,
    let_lr: float | None = None,
    lwc_lr: float | None = None,
    seeds: int = 5,
    windows: int = 64,
    calib: str = "zoo:pydoc",
    outliers: Annotated[float, typer.Option(help="First grow outlier channels by this factor.")] = 1.0,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    settings = {
        "wbits": wbits,
        "abits": abits,
        "group_size": group_size,
        "nsamples": nsamples,
        "seqlen": seqlen,
        "calibration": calib,
    }
    learning = {"epochs": epochs, "batch_size": batch_size, "let_lr": let_lr, "lwc_lr": lwc_lr}
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if outliers != 1.0:
            grow_outliers(model, Path(folder) / "outliers", outliers)
            model = str(Path(folder) / "outliers")
        full = lrquant.evaluate(model, TEXTS, seqlen, limit_windows=windows)
        title = recipe_of("rtn", settings, learning).format_name
        print(
            f"\n{title}, {nsamples} samples of {seqlen} tokens of {calib}, {epochs} epochs, {seeds} seeds"
            + (f", outliers × {outliers:g}" if outliers != 1 else "")
            + "\n"
        )
        print(f"| method | {' | '.join(TEXTS)} | seconds |\n|---|---|---|---|")
        print("| full precision | " + " | ".join(f"{full[text].value:.3f}" for text in TEXTS) + " | |", flush=True)
        for method in methods.split():
            found: dict[str, list[float]] = {text: [] for text in TEXTS}
            seconds = []
            for seed in range(seeds):
                recipe = recipe_of(method, settings, learning).changed(seed=seed)
                quantized = lrquant.quantize(model, recipe)
                seconds.append(quantized.seconds)
                measured = lrquant.evaluate(
                    quantized.model, TEXTS, seqlen, limit_windows=windows, tokenizer=quantized.tokenizer
                )
                for text in TEXTS:
                    found[text].append(measured[text].value)
            results[method] = {"perplexity": found, "seconds": seconds}
            columns = " | ".join(spread(found[text]) for text in TEXTS)
            print(f"| {method} | {columns} | {statistics.mean(seconds):.1f} |", flush=True)
    if json_file:
        json_file.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    typer.run(main)
