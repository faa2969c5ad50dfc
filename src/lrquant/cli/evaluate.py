"""`lrquant eval`: how good a model is, quantized or not."""

import time
from typing import Annotated, Any

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
    images: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|PATH", help="Pictures: zoo:shapes, a folder with one subfolder per class, the hub."),
    ] = None,
    vqa: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|PATH", help="Questions about pictures: zoo:shapes-vqa, or a .jsonl file."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many pictures or questions.", show_default="1000 pictures")
    ] = None,
    dtype: Precision = Dtype.auto,
    device: Device = "auto",
    json: JsonFile = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure MODEL's perplexity on texts, its accuracy on pictures, its answers to questions about pictures."""
    if not (ppl or images or vqa):
        raise UsageError(
            "nothing to measure: name a text with --ppl (wikitext2, zoo:pydoc), pictures with --images (zoo:shapes), "
            "or questions with --vqa (zoo:shapes-vqa)"
        )
    console.check_json_path(json)
    figures: dict[str, Any] = {"model": model}
    if images or vqa:
        from lrquant.cli.seeing import measure_vision

        how = {"device": device, "dtype": dtype.value, "trust_remote_code": trust_remote_code}
        figures |= measure_vision(model, images or [], vqa or [], limit, **how)
    if not ppl:
        console.write_json(json, figures)
        return

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
            **figures,
            "seconds": seconds,
            "perplexity": {name: result.value for name, result in measured.items()},
            "evaluation": {name: {"windows": r.windows, "seqlen": r.seqlen} for name, r in measured.items()},
        },
    )
