"""The tables of docs/benchmarks-vision.md: `python benchmarks/vision.py RESULTS.jsonl [--model zoo:vit] …`.

Every run is appended to RESULTS.jsonl as it ends and is not repeated, so that an interrupted table goes on;
the table is printed at the end, as mean ± standard deviation over seeds.
"""

import json
import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer

import lrquant
from lrquant.cli.demo_vision import LEARNING, METHODS, SIGHTS

Run = dict[str, float | int | str]


def measure(model: str, method: str, wbits: int, abits: int, seed: int, limit: int) -> Run:
    """One quantized model's two measures."""
    sight = SIGHTS[model]
    recipe = lrquant.Recipe.preset(
        method,
        wbits=wbits,
        abits=abits,
        calibration=sight.calibration,
        nsamples=32,
        towers=sight.towers,
        seed=seed,
    )
    if recipe.learns:
        recipe = recipe.changed(**LEARNING)
    quantized = lrquant.quantize(model, recipe)
    first, second = sight.measure(quantized.model, sight.heldout, limit, quantized.tokenizer)
    return {"first": first, "second": second, "seconds": quantized.seconds}


def main(
    results: Annotated[Path, typer.Argument(help="A JSON-lines file that grows.")],
    model: str = "zoo:vit",
    formats: Annotated[str, typer.Option(help="wbits:abits, with commas between.")] = "4:4",
    seeds: int = 5,
    limit: Annotated[int, typer.Option(help="Held-out samples.")] = 1000,
) -> None:
    torch.set_num_threads(1)
    known = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    table: dict[tuple[str, str], list[Run]] = {}

    def run(method: str, wbits: int, abits: int, seed: int) -> Run:
        key = {"model": model, "method": method, "wbits": wbits, "abits": abits, "seed": seed, "limit": limit}
        for row in known:
            if key.items() <= row.items():
                return row
        sight = SIGHTS[model]
        if method == "full precision":
            first, second = sight.measure(model, sight.heldout, limit)
            values: Run = {"first": first, "second": second, "seconds": 0.0}
        else:
            values = measure(model, method, wbits, abits, seed, limit)
        with results.open("a") as file:
            file.write(json.dumps(key | values) + "\n")
        return values

    table["", "full precision"] = [run("full precision", 16, 16, 0)]
    for pair in formats.split(","):
        wbits, abits = map(int, pair.split(":"))
        for method in METHODS:
            once = method == "rtn"  # rounds to nearest whatever the samples are
            runs = [run(method, wbits, abits, seed) for seed in range(1 if once else seeds)]
            table[f"W{wbits}A{abits}", method] = runs
    first, second = SIGHTS[model].columns
    print(f"| format | method | {first} | {second} | seconds |\n|---|---|---:|---:|---:|")
    for (name, method), runs in table.items():
        cells = [_spread([float(each[value]) for each in runs]) for value in ("first", "second")]
        seconds = statistics.mean(float(each["seconds"]) for each in runs)
        print(f"| {name} | {method} | {cells[0]} | {cells[1]} | {seconds:.1f} |")


def _spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"


if __name__ == "__main__":
    typer.run(main)
