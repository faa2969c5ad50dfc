"""`lrquant demo`: quantize a bundled model with every method, offline, in a few minutes."""

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrquant.cli import console
from lrquant.cli.bundled import SHOWS
from lrquant.cli.options import JsonFile
from lrquant.cli.reporting import leave_demo_report
from lrquant.errors import UsageError

if TYPE_CHECKING:
    from lrquant.report.run import Metric

METHODS = ("rtn", "smoothquant", "omniquant", "lrquant", "lrquant+")
KEPT = "lrquant"  # the method whose checkpoint is written, measured as it comes back from disk, and reported


def demo(
    model: Annotated[str, typer.Option(help=f"{', '.join(SHOWS)}.")] = "zoo:llama",
    save_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Save the LRQuant checkpoint in this folder.", show_default="not kept"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the calibration samples.")] = 0,
    json: JsonFile = None,
) -> None:
    """Quantize a bundled model to W4A4 with every method and compare them on held-out text or images."""
    console.check_output(json)
    if model not in SHOWS:
        raise UsageError(f"no demo for {model!r}: there are {', '.join(SHOWS)}")
    from lrquant.entrypoints.quantize import quantize
    from lrquant.export import check_save_dir
    from lrquant.loading.pretrained import pick_device
    from lrquant.recipe import Recipe
    from lrquant.reconstruction.callbacks import Callbacks
    from lrquant.report.observer import Observer

    if save_dir is not None:
        check_save_dir(save_dir)
    show = SHOWS[model]
    console.say(
        f"Quantizing the bundled model ({model}) to 4-bit weights and activations, "
        f"calibrated on {show.recipe['nsamples']} {show.samples}."
    )
    began = time.perf_counter()

    def measure(quantized: Any, processor: Any = None) -> "list[Metric]":
        with console.counting("Measuring") as told:
            return show.measure(quantized, processor, show.limit, told)

    before = measure(model)
    results = {"full precision": _row(before, 16.0, 0, 0.0)}
    with tempfile.TemporaryDirectory() as temporary:
        kept = save_dir or Path(temporary) / "w4a4"
        observer = Observer()
        for method in METHODS:
            recipe = Recipe.preset(method, wbits=4, abits=4, seed=seed, **show.recipe)
            if recipe.learns:
                recipe = recipe.changed(**show.learning)
            with console.watching(method) as progress:
                target, callback = (kept, Callbacks(progress, observer)) if method == KEPT else (None, progress)
                quantized = quantize(model, recipe, save_dir=target, callback=callback)
            sizes = quantized.sizes
            results["full precision"]["megabytes"] = sizes.bf16_bytes / 1e6
            measured = measure(str(kept)) if method == KEPT else measure(quantized.model, quantized.tokenizer)
            results[method] = _row(measured, sizes.bits_per_weight, sizes.checkpoint_bytes, quantized.seconds)
            if method == KEPT:
                shown, after = quantized, measured
        said = show.speak(str(kept)) if show.speak else None
        metrics = [
            new.model_copy(update={"before": old.after, "windows_before": old.windows_after})
            for old, new in zip(before, after, strict=True)
        ]
        rows = [(method, row["measured"], row) for method, row in results.items()]
        page = leave_demo_report(shown, observer, model, pick_device("auto"), metrics, rows, save_dir)
    names = [metric.name for metric in before]
    console.table(
        f"W4A4 on {show.limit} {show.heldout}",
        ["method", *names, "bits/weight", "size", "seconds"],
        [
            [
                method,
                *(f"{row['measured'][name]:.3f}" for name in names),
                f"{row['bits_per_weight']:.2f}",
                f"{row['megabytes']:.2f} MB",
                f"{row['seconds']:.1f}" if row["seconds"] else "",
            ]
            for method, row in results.items()
        ],
    )
    if said:
        console.say(f"The LRQuant model, loaded from disk by plain transformers, {said}")
    if save_dir:
        console.note(f"the checkpoint is in {save_dir}: from_pretrained of transformers' Auto classes loads it")
    seconds = time.perf_counter() - began
    console.say(f"{seconds:.0f} seconds in total; report: {page}")
    console.write_json(json, {"model": model, "seconds": seconds, "methods": results, "said": said})


def _row(measured: "list[Metric]", bits: float, size: int, seconds: float) -> dict[str, Any]:
    values = {metric.name: metric.after for metric in measured}
    return {"measured": values, "bits_per_weight": bits, "megabytes": size / 1e6, "seconds": seconds}
