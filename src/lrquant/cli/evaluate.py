"""`lrquant eval`: how good a model is, quantized or not."""

import time
from typing import Annotated

import typer

from lrquant.cli import console
from lrquant.cli.quantize import Device, Dtype, JsonFile, Limit, Model, NumFewshot, Precision, Tasks, Trust
from lrquant.errors import LrquantError, UsageError


def evaluate(
    model: Model,
    ppl: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|PATH", help="Text: wikitext2, ptb, c4, zoo:pydoc, zoo:pycode, a file, a folder."),
    ] = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens per window.", show_default="2048 or the model's most")
    ] = None,
    limit_windows: Annotated[int | None, typer.Option(min=1, help="Only so many windows.")] = None,
    tasks: Tasks = None,
    num_fewshot: NumFewshot = None,
    limit: Limit = None,
    dtype: Precision = Dtype.auto,
    device: Device = "auto",
    json: JsonFile = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure MODEL's perplexity on texts, and lm-eval's tasks."""
    if not ppl and not tasks:
        raise UsageError(
            "nothing to measure: name a text, for example --ppl wikitext2 or --ppl zoo:pydoc, or tasks, --tasks piqa"
        )
    console.check_json_path(json)

    from lrquant.api import evaluate as measure
    from lrquant.checkpoints import load
    from lrquant.cli.tasks import measure_tasks, show_tasks, split_tasks
    from lrquant.models import compute_dtype, load_tokenizer, pick_device

    wanted = split_tasks(tasks)
    began = time.perf_counter()
    tokenizer = load_tokenizer(model, trust_remote_code)
    loaded = load(model, compute_dtype(dtype.value, pick_device(device)), trust_remote_code)
    measured = {}
    if ppl:
        with console.status("Measuring perplexity"):
            measured = measure(loaded, ppl, seqlen, limit_windows, tokenizer, device)
    by_task = measure_tasks(loaded, tokenizer, wanted, num_fewshot, limit, device)
    seconds = time.perf_counter() - began
    if measured:
        rows = [[name, f"{r.value:.4f}", str(r.windows), str(r.seqlen)] for name, r in measured.items()]
        console.table(f"{model}, {seconds:.1f} s", ["text", "perplexity", "windows", "tokens each"], rows)
    show_tasks(by_task)
    console.write_json(
        json,
        {
            "model": model,
            "seconds": seconds,
            "perplexity": {name: result.value for name, result in measured.items()},
            "evaluation": {name: {"windows": r.windows, "seqlen": r.seqlen} for name, r in measured.items()},
            "tasks": by_task.results,
        },
    )
    if not measured and not by_task.results:
        raise LrquantError("none of the tasks could be run")
