"""`lrquant demo`: the whole job on the bundled model, offline, in a few minutes."""

import io
import tempfile
import time
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrquant.cli import console
from lrquant.cli.quantize import JsonFile
from lrquant.cli.reporting import leave_demo_report, metrics_of

if TYPE_CHECKING:
    from lrquant.evaluation import Perplexity

MODEL = "zoo:llama"
TEXTS = ("zoo:pydoc", "zoo:pycode")
KEPT = "lrquant"  # the method whose checkpoint is written, read back and reported
METHODS = ("rtn", "smoothquant", "omniquant", "lrquant")
SETTINGS: dict[str, Any] = {"wbits": 4, "abits": 4, "calibration": "zoo:pydoc", "nsamples": 32, "seqlen": 256}
LEARNING: dict[str, Any] = {"epochs": 5, "batch_size": 4}
WINDOWS = 64
PROMPT = "The for statement is used to"


def demo(
    model: Annotated[str, typer.Option(help="zoo:llama or zoo:vit.")] = MODEL,
    save_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the LRQuant checkpoint here.", show_default="not kept")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides the calibration samples.")] = 0,
    json: JsonFile = None,
) -> None:
    """Quantize a bundled model to W4A4 with every method and compare them on held-out text or pictures."""
    console.check_json_path(json)
    if model != MODEL:
        from lrquant.cli.demo_vision import demo_vision

        demo_vision(model, save_dir, seed, json)
        return

    from lrquant.api import evaluate, quantize
    from lrquant.models import pick_device
    from lrquant.recipe import Recipe
    from lrquant.report.observer import Observer
    from lrquant.watching import Watchers

    console.say(
        f"Quantizing the bundled model ({MODEL}) to 4-bit weights and activations, "
        f"{SETTINGS['nsamples']} calibration samples of {SETTINGS['seqlen']} tokens."
    )
    began = time.perf_counter()

    def measure(model: Any, tokenizer: Any = None) -> dict[str, "Perplexity"]:
        with console.counting("Measuring perplexity") as told:
            return evaluate(model, TEXTS, SETTINGS["seqlen"], WINDOWS, tokenizer=tokenizer, told=told)

    results: dict[str, dict[str, Any]] = {}
    full = measure(MODEL)
    results["full precision"] = _row(full, 16.0, 0.0, 0.0)
    with tempfile.TemporaryDirectory() as temporary:
        kept = save_dir or Path(temporary) / "llama-w4a4"
        observer = Observer()
        for method in METHODS:
            recipe = Recipe.preset(method, **SETTINGS, seed=seed)
            if recipe.learns:
                recipe = recipe.changed(**LEARNING)
            with console.watching(method) as progress:
                target, watcher = (kept, Watchers(progress, observer)) if method == KEPT else (None, progress)
                quantized = quantize(MODEL, recipe, save_dir=target, watcher=watcher)
            results["full precision"]["megabytes"] = quantized.sizes.bf16_bytes / 1e6
            if method == KEPT:
                shown = quantized
            # LRQuant is measured as it comes back from disk; the others as they are in memory.
            measured = measure(str(kept)) if method == KEPT else measure(quantized.model, quantized.tokenizer)
            sizes = quantized.sizes
            results[method] = _row(measured, sizes.bits_per_weight, sizes.checkpoint_bytes / 1e6, quantized.seconds)
            if method == KEPT:
                after = measured
        text = _generate(str(kept))
        page = leave_demo_report(
            shown,
            observer,
            MODEL,
            pick_device("auto"),
            metrics_of(full, after),
            [(method, row["perplexity"], row) for method, row in results.items()],
            save_dir,
        )
    names = list(full)
    console.table(
        f"W4A4 on held-out text, {WINDOWS} windows of {SETTINGS['seqlen']} tokens (perplexity: lower is better)",
        ["method", *names, "bits/weight", "size", "seconds"],
        [
            [
                method,
                *(f"{row['perplexity'][name]:.3f}" for name in names),
                f"{row['bits_per_weight']:.2f}",
                f"{row['megabytes']:.1f} MB",
                f"{row['seconds']:.1f}" if row["seconds"] else "",
            ]
            for method, row in results.items()
        ],
    )
    console.say("The LRQuant model, loaded from disk by plain transformers, continues:")
    console.say(text)
    if save_dir:
        console.note(f'the checkpoint is in {save_dir}: AutoModelForCausalLM.from_pretrained("{save_dir}") loads it')
    seconds = time.perf_counter() - began
    console.say(f"{seconds:.0f} seconds in all; what happened, in pictures: {page}")
    console.write_json(json, {"model": MODEL, "seconds": seconds, "methods": results, "generated": text})


def _row(measured: dict[str, "Perplexity"], bits: float, megabytes: float, seconds: float) -> dict[str, Any]:
    perplexity = {name: result.value for name, result in measured.items()}
    return {"perplexity": perplexity, "bits_per_weight": bits, "megabytes": megabytes, "seconds": seconds}


def _generate(path: str) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with redirect_stderr(io.StringIO()):  # compressed-tensors' progress bars
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
        inputs = tokenizer(PROMPT, return_tensors="pt")
        ids = model.generate(  # type: ignore[misc]
            inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=32, do_sample=False
        )
    return str(tokenizer.decode(ids[0]))
