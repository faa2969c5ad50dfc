"""Measurements of vision models by `lrquant eval`."""

import time
from typing import Any

from lrquant.cli import console


def measure_vision(
    model: str, images: list[str], vqa: list[str], limit: int | None, **how: Any
) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy on each of `images` and answers to each of `vqa`, as tables and as figures."""
    from lrquant.entrypoints.evaluate import evaluate_answers, evaluate_images

    figures: dict[str, dict[str, dict[str, float]]] = {}
    if images:
        began = time.perf_counter()
        with console.counting("Measuring accuracy") as told:
            accuracy = evaluate_images(model, images, limit, callback=told, **how)
        rows = [
            [name, f"{100 * r.top1:.2f}", f"{100 * r.top5:.2f}", f"{r.loss:.4f}", str(r.pictures)]
            for name, r in accuracy.items()
        ]
        title = f"{model}, {time.perf_counter() - began:.1f} s"
        console.table(title, ["images", "top-1 %", "top-5 %", "loss", "pictures"], rows)
        figures["accuracy"] = {name: vars(result) for name, result in accuracy.items()}
    if vqa:
        began = time.perf_counter()
        with console.counting("Asking questions") as told:
            answers = evaluate_answers(model, vqa, limit, callback=told, **how)
        rows = [
            [name, f"{100 * r.exact_match:.2f}", f"{r.perplexity:.4f}", str(r.questions)] for name, r in answers.items()
        ]
        title = f"{model}, {time.perf_counter() - began:.1f} s"
        console.table(title, ["questions", "exact match %", "answer perplexity", "asked"], rows)
        figures["answers"] = {name: vars(result) for name, result in answers.items()}
    return figures
