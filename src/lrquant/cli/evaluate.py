"""`lrquant eval`: measure a model, quantized or not."""

import time
from typing import Annotated, Any, Literal

import typer

from lrquant.cli import console
from lrquant.cli.options import Device, Dtype, JsonFile, Limit, Model, NumFewshot, Precision, Tasks, Trust
from lrquant.errors import LrquantError, UsageError


def evaluate(
    model: Model,
    ppl: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|PATH", help="Text: wikitext2, ptb, c4, zoo:pydoc, zoo:pycode, a file, a folder."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="ORIGINAL", help="Also compare predictions with those of this model, on the same texts."),
    ] = None,
    seqlen: Annotated[
        int | None, typer.Option(min=2, help="Tokens per window.", show_default="2048, or the model's maximum")
    ] = None,
    limit_windows: Annotated[int | None, typer.Option(min=1, help="Evaluate at most N windows.")] = None,
    bos: Annotated[
        Literal["auto", "off"],
        typer.Option(
            help="Begin every window with the BOS token if the tokenizer adds it; off: as in published results."
        ),
    ] = "auto",
    tasks: Tasks = None,
    num_fewshot: NumFewshot = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|PATH",
            help="Images: zoo:shapes, a folder with one subfolder per class, or a data set on the hub.",
        ),
    ] = None,
    vqa: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|PATH", help="Questions about images: zoo:shapes-vqa, or a .jsonl file."),
    ] = None,
    limit: Limit = None,
    dtype: Precision = Dtype.auto,
    device: Device = "auto",
    json: JsonFile = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure MODEL: perplexity on texts, lm-eval's tasks, image accuracy, answers about images."""
    if not (ppl or tasks or images or vqa):
        raise UsageError(
            "nothing to measure: name a text with --ppl (wikitext2, zoo:pydoc), tasks with --tasks (piqa), "
            "images with --images (zoo:shapes), or questions with --vqa (zoo:shapes-vqa)"
        )
    console.check_output(json)
    if against is not None and not ppl:
        raise UsageError("--against compares predictions on a text: name one with --ppl")
    figures: dict[str, Any] = {"model": model}
    first = console.speaks()
    if (images or vqa) and first:
        from lrquant.cli.seeing import measure_vision

        how = {"device": device, "dtype": dtype.value, "trust_remote_code": trust_remote_code}
        figures |= measure_vision(model, images or [], vqa or [], limit, **how)
    if not (ppl or tasks):
        console.write_json(json, figures)
        return

    from lrquant.cli.tasks import measure_tasks, show_tasks, split_tasks
    from lrquant.entrypoints.evaluate import compare_predictions
    from lrquant.entrypoints.evaluate import evaluate as measure
    from lrquant.loading.auto_class import modality_of
    from lrquant.loading.checkpoint import load
    from lrquant.loading.pretrained import compute_dtype, load_processor, pick_device
    from lrquant.runtime.distributed import leave

    wanted = split_tasks(tasks)
    began = time.perf_counter()
    loaded = load(model, compute_dtype(dtype.value, pick_device(device)), trust_remote_code)
    tokenizer = load_processor(model, modality_of(loaded), trust_remote_code)
    measured, compared = {}, {}
    if ppl:
        with console.counting("Measuring perplexity") as told:
            measured = measure(
                loaded,
                ppl,
                seqlen,
                limit_windows=limit_windows,
                tokenizer=tokenizer,
                device=device,
                bos=bos,
                callback=told,
            )
    if ppl and against is not None:
        with console.counting("Comparing predictions") as told:
            compared = compare_predictions(
                loaded,
                against,
                ppl,
                seqlen=seqlen,
                limit_windows=limit_windows,
                tokenizer=tokenizer,
                device=device,
                dtype=dtype.value,
                trust_remote_code=trust_remote_code,
                bos=bos,
                callback=told,
            )
    leave()
    if not first:
        return
    by_task = measure_tasks(loaded, tokenizer, wanted, num_fewshot, limit, device)
    seconds = time.perf_counter() - began
    if measured:
        rows = [[name, f"{r.value:.4f}", str(r.windows), str(r.seqlen)] for name, r in measured.items()]
        console.table(f"{model}, {seconds:.1f} s", ["text", "perplexity", "windows", "tokens each"], rows)
        if any(r.bos for r in measured.values()):
            console.note("every window begins with the BOS token; --bos off measures as published results do")
    if compared:
        rows = [[name, f"{each.divergence:.4f}", f"{100 * each.top1:.1f}"] for name, each in compared.items()]
        console.table(f"against {against}", ["text", "KL divergence, nats per token", "same top token, %"], rows)
    show_tasks(by_task)
    console.write_json(
        json,
        {
            **figures,
            "seconds": seconds,
            "perplexity": {name: result.value for name, result in measured.items()},
            "evaluation": {
                name: {"windows": r.windows, "seqlen": r.seqlen, "bos": r.bos} for name, r in measured.items()
            },
            "agreement": {name: {"divergence": r.divergence, "top1": r.top1} for name, r in compared.items()},
            "tasks": by_task.results,
        },
    )
    if not measured and not by_task.results:
        raise LrquantError("none of the tasks could be run")
