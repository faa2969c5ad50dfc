"""Seconds and perplexity of whole runs, beside a plain implementation of the same mathematics.

    python benchmarks/whole_run.py                     # half an hour on two cores
    python benchmarks/whole_run.py --schedules default

Every run is a process of its own, from reading the text to the last block. `plain` is what the tests check the engine
by, in the engine's own loop (block_step.py). `first` has compiled nothing before, `again` finds what `first` compiled.
"""

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from typing import Annotated, Any

import torch
import typer

import lrquant
from block_step import plain
from lrquant import Recipe

SCHEDULES: dict[str, dict[str, Any]] = {
    "papers": {"epochs": 20, "batch_size": 1, "schedule": "constant", "let_lr": 5e-3, "lwc_lr": 1e-2},
    "default": {},
}
RUNS = ("plain", "first", "again")


def run(implementation: str, model: str, recipe: str, seqlen: int, windows: int, text: str) -> tuple[float, float]:
    """(seconds, perplexity) of one run, in this process."""
    chosen = Recipe.parse(json.loads(recipe))
    if implementation == "plain":
        chosen = chosen.changed(kernels="eager", products="float32")
    began = time.perf_counter()
    with plain() if implementation == "plain" else nullcontext():
        quantized = lrquant.quantize(model, chosen)
    seconds = time.perf_counter() - began
    measured = lrquant.evaluate(quantized.model, [text], seqlen, limit_windows=windows, tokenizer=quantized.tokenizer)
    return seconds, measured[text].value


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main(
    model: str = "zoo:llama",
    schedules: Annotated[str, typer.Option(help="Separated by spaces.")] = " ".join(SCHEDULES),
    method: str = "lrquant",
    wbits: int = 4,
    abits: int = 4,
    nsamples: int = 128,
    seqlen: int = 256,
    windows: int = 64,
    calib: str = "zoo:pydoc",
) -> None:
    print(f"\n{model}, {nsamples} samples of {seqlen}, {torch.get_num_threads()} threads\n")
    print(f"| schedule | implementation | seconds | speedup | {calib} |\n|---|---|---|---|---|", flush=True)
    for name in schedules.split():
        recipe = Recipe.preset(
            method, wbits=wbits, abits=abits, nsamples=nsamples, seqlen=seqlen, calibration=calib, **SCHEDULES[name]
        )
        reference = None
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # of the processes to come
            for implementation in RUNS:
                seconds, perplexity = in_own_process(
                    run, implementation, model, json.dumps(recipe.model_dump(mode="json")), seqlen, windows, calib
                )
                reference = reference or seconds
                cells = (name, implementation, f"{seconds:.0f}", f"{reference / seconds:.1f}", f"{perplexity:.3f}")
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
