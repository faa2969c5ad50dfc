"""`lrquant demo --model zoo:vit`: the whole job on the bundled models that see."""

import io
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrquant.cli import console
from lrquant.cli.reporting import leave_demo_report
from lrquant.errors import UsageError

METHODS = ("rtn", "smoothquant", "omniquant", "lrquant", "lrquant+")
KEPT = "lrquant"  # the method whose checkpoint is written and read back
LEARNING: dict[str, Any] = {"epochs": 5, "batch_size": 4}


@dataclass(frozen=True)
class Sight:
    """What is shown of one kind of model."""

    calibration: str
    heldout: str
    limit: int
    columns: tuple[str, str]
    measure: Callable[..., tuple[float, float]]  # the two columns' values
    towers: tuple[str, ...] | None = None


def _classify(model: Any, source: str, limit: int, processor: Any = None) -> tuple[float, float]:
    from lrquant.api_vision import evaluate_images

    result = evaluate_images(model, [source], limit, processor)[source]
    return 100 * result.top1, 100 * result.top5


def _ask(model: Any, source: str, limit: int, processor: Any = None) -> tuple[float, float]:
    from lrquant.api_vision import evaluate_answers

    result = evaluate_answers(model, [source], limit, processor)[source]
    return 100 * result.exact_match, result.perplexity


SIGHTS = {
    "zoo:vit": Sight("zoo:shapes", "zoo:shapes", 500, ("top-1 %", "top-5 %"), _classify),
    "zoo:llava": Sight(
        "zoo:shapes-vqa",
        "zoo:shapes-vqa",
        150,
        ("exact match %", "answer perplexity"),
        _ask,
        towers=("vision", "language"),
    ),
}


def demo_vision(name: str, save_dir: Path | None, seed: int, json: Path | None) -> None:
    """Quantize a bundled model to W4A4 with every method and compare them on held-out pictures."""
    if name not in SIGHTS:
        raise UsageError(f"no demo of {name!r}: there are zoo:llama, {', '.join(SIGHTS)}")
    from lrquant.api import quantize
    from lrquant.models import pick_device
    from lrquant.recipe import Recipe
    from lrquant.report.observer import Observer
    from lrquant.report.run import Metric
    from lrquant.watching import Watchers

    sight = SIGHTS[name]
    settings: dict[str, Any] = {
        "wbits": 4,
        "abits": 4,
        "calibration": sight.calibration,
        "nsamples": 32,
        "towers": sight.towers,
    }
    console.say(f"Quantizing the bundled model ({name}) to 4-bit weights and activations, 32 calibration samples.")
    began = time.perf_counter()

    def measure(model: Any, processor: Any = None) -> tuple[float, float]:
        with console.status("Looking at held-out pictures"):
            return sight.measure(model, sight.heldout, sight.limit, processor)

    first, second = measure(name)
    results: dict[str, dict[str, Any]] = {"full precision": _row(sight, first, second, 16.0, 0.0, 0.0)}
    with tempfile.TemporaryDirectory() as temporary:
        kept = save_dir or Path(temporary) / "w4a4"
        observer = Observer()
        for method in METHODS:
            recipe = Recipe.preset(method, **settings, seed=seed)
            if recipe.learns:
                recipe = recipe.changed(**LEARNING)
            with console.watching(method) as progress:
                target, watcher = (kept, Watchers(progress, observer)) if method == KEPT else (None, progress)
                quantized = quantize(name, recipe, save_dir=target, watcher=watcher)
            results["full precision"]["megabytes"] = quantized.sizes.bf16_bytes / 1e6
            measured = measure(str(kept)) if method == KEPT else measure(quantized.model, quantized.tokenizer)
            sizes = quantized.sizes
            results[method] = _row(
                sight, *measured, sizes.bits_per_weight, sizes.checkpoint_bytes / 1e6, quantized.seconds
            )
            if method == KEPT:
                shown, after = quantized, measured
        answer = _answer(str(kept)) if name == "zoo:llava" else None
        metrics = [
            Metric(name=column, before=before, after=value, better="lower" if "perplexity" in column else "higher")
            for column, before, value in zip(sight.columns, (first, second), after, strict=True)
        ]
        rows = [(method, {column: row[column] for column in sight.columns}, row) for method, row in results.items()]
        page = leave_demo_report(shown, observer, name, pick_device("auto"), metrics, rows, save_dir)
    console.table(
        f"W4A4 on {sight.limit} held-out samples of {sight.heldout}",
        ["method", *sight.columns, "bits/weight", "size", "seconds"],
        [
            [
                method,
                *(f"{row[column]:.2f}" for column in sight.columns),
                f"{row['bits_per_weight']:.2f}",
                f"{row['megabytes']:.2f} MB",
                f"{row['seconds']:.1f}" if row["seconds"] else "",
            ]
            for method, row in results.items()
        ],
    )
    if answer:
        console.say(f"The LRQuant model, loaded from disk by plain transformers, is asked: {answer}")
    if save_dir:
        console.note(f"the checkpoint is in {save_dir}")
    seconds = time.perf_counter() - began
    console.say(f"{seconds:.0f} seconds in all; what happened, in pictures: {page}")
    console.write_json(json, {"model": name, "seconds": seconds, "methods": results, "generated": answer})


def _row(sight: Sight, first: float, second: float, bits: float, megabytes: float, seconds: float) -> dict[str, float]:
    values = dict(zip(sight.columns, (first, second), strict=True))
    return values | {"bits_per_weight": bits, "megabytes": megabytes, "seconds": seconds}


def _answer(path: str) -> str:
    """One held-out question, the answer that plain transformers gives, and the right one."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from lrquant.zoo.shapes import questions

    ((image, asked),) = questions(train=False, count=1)
    with redirect_stderr(io.StringIO()):  # compressed-tensors' progress bars
        processor = AutoProcessor.from_pretrained(path)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype="float32")
        content = [{"type": "image"}, {"type": "text", "text": asked.question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=image, text=text, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)  # type: ignore[misc]
    said = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return f"{asked.question}{said} (it is {asked.answer})"
