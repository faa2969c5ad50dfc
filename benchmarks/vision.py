"""The tables of docs/benchmarks-vision.md.

    python benchmarks/vision.py --model zoo:vit --formats 4:4 --json results.jsonl

With `--json`, every run is appended to the file as it ends and is not repeated, so that an interrupted table
goes on where it was. The table is printed at the end, as mean ± standard deviation over seeds.
"""

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import lrquant
from lrquant.cli.bundled import SHOWS
from lrquant.cli.demo import METHODS
from lrquant.report.run import Metric

Run = dict[str, Any]


def measure(model: str, method: str, wbits: int, abits: int, seed: int, limit: int) -> Run:
    """One quantized model's measures, by column."""
    show = SHOWS[model]
    if method == "full precision":
        return {"measured": values(show.measure(model, None, limit, quietly)), "seconds": 0.0}
    recipe = lrquant.Recipe.preset(method, wbits=wbits, abits=abits, seed=seed, **show.recipe)
    if recipe.learns:
        recipe = recipe.changed(**show.learning)
    quantized = lrquant.quantize(model, recipe)
    measured = show.measure(quantized.model, quantized.tokenizer, limit, quietly)
    return {"measured": values(measured), "seconds": quantized.seconds}


def quietly(done: int, total: int) -> None:
    """Progress is not shown here."""


def values(measured: list[Metric]) -> dict[str, float]:
    return {metric.name: metric.after for metric in measured}


def main(
    model: str = "zoo:vit",
    formats: Annotated[str, typer.Option(help="wbits:abits, with commas between.")] = "4:4",
    methods: str = " ".join(METHODS),
    seeds: int = 5,
    limit: Annotated[int, typer.Option(help="Held-out samples.")] = 2000,
    json_file: Annotated[Path | None, typer.Option("--json", help="JSON lines: one per run.")] = None,
) -> None:
    torch.set_num_threads(1)
    known = (
        [json.loads(line) for line in json_file.read_text().splitlines()] if json_file and json_file.exists() else []
    )
    table: dict[tuple[str, str], list[Run]] = {}

    def run(method: str, wbits: int, abits: int, seed: int) -> Run:
        key = {"model": model, "method": method, "wbits": wbits, "abits": abits, "seed": seed, "limit": limit}
        for row in known:
            if key.items() <= row.items():
                return row
        row = key | measure(**key)
        if json_file:
            with json_file.open("a") as file:
                file.write(json.dumps(row) + "\n")
        return row

    table["", "full precision"] = [run("full precision", 16, 16, 0)]
    for pair in formats.split(","):
        wbits, abits = map(int, pair.split(":"))
        for method in methods.split():
            once = method == "rtn"  # rounds to nearest whatever the samples are
            runs = [run(method, wbits, abits, seed) for seed in range(1 if once else seeds)]
            table[f"W{wbits}A{abits}", method] = runs
    columns = list(table["", "full precision"][0]["measured"])
    print(f"| format | method | {' | '.join(columns)} | seconds |\n|---|---|{'---:|' * len(columns)}---:|")
    for (name, method), runs in table.items():
        cells = [spread([each["measured"][column] for each in runs]) for column in columns]
        seconds = statistics.mean(each["seconds"] for each in runs)
        print(f"| {name} | {method} | {' | '.join(cells)} | {seconds:.1f} |")


def spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


if __name__ == "__main__":
    typer.run(main)
