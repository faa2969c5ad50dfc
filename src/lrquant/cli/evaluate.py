"""`lrquant eval`: how good a model is, quantized or not."""

import time
from typing import Annotated

import typer

from lrquant.cli import console
from lrquant.cli.quantize import Device, Dtype, JsonFile, Model, Precision, Trust
from lrquant.errors import UsageError


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
    dtype: Precision = Dtype.auto,
    device: Device = "auto",
    json: JsonFile = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure MODEL's perplexity on one or more texts."""
    if not ppl:
        raise UsageError("nothing to measure: name a text with --ppl, for example --ppl wikitext2 or --ppl zoo:pydoc")
    console.check_json_path(json)

    from lrquant.api import evaluate as measure

    began = time.perf_counter()
    with console.status("Measuring perplexity"):
        measured = measure(
            model, ppl, seqlen, limit_windows, device=device, dtype=dtype.value, trust_remote_code=trust_remote_code
        )
    seconds = time.perf_counter() - began
    rows = [[name, f"{r.value:.4f}", str(r.windows), str(r.seqlen)] for name, r in measured.items()]
    console.table(f"{model}, {seconds:.1f} s", ["text", "perplexity", "windows", "tokens each"], rows)
    console.write_json(
        json,
        {
            "model": model,
            "seconds": seconds,
            "perplexity": {name: result.value for name, result in measured.items()},
            "evaluation": {name: {"windows": r.windows, "seqlen": r.seqlen} for name, r in measured.items()},
        },
    )
