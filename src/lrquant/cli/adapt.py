"""`lrquant adapt`: fit a quantized checkpoint to a test set that it was not calibrated on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrquant.cli import console
from lrquant.cli.hub import check_can_push, push
from lrquant.cli.options import Device, JsonFile, LogTo, Private, PushToHub, Report, Trust
from lrquant.cli.reporting import command_line, metrics_of
from lrquant.cli.settings import takes_settings
from lrquant.cli.tracking import tracking

if TYPE_CHECKING:
    from lrquant.evaluation import Perplexity

REPORT_WINDOWS = 32  # of the text, when no evaluation is asked for


@takes_settings(epochs=5, init="neutral", nsamples=128, seqlen="as in calibration")
def adapt(
    quantized: Annotated[
        str, typer.Argument(metavar="QUANTIZED", help="A checkpoint written by lrquant; it is not changed.")
    ],
    settings: dict[str, Any],
    reference: Annotated[str, typer.Option(metavar="MODEL", help="The full-precision model that it was made from.")],
    data: Annotated[str, typer.Option(metavar="NAME|PATH", help="The unlabelled test text.")],
    save_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder for the adapted checkpoint; it must not exist yet.")
    ],
    blocks: Annotated[str, typer.Option(help="Blocks to adapt: last, all, or indices such as 0,4,5.")] = "last",
    eval_ppl: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|PATH", help="Measure perplexity on this text before and after; can be repeated."),
    ] = None,
    limit_windows: Annotated[int | None, typer.Option(min=1, help="Evaluate at most N windows.")] = None,
    device: Device = "auto",
    json: JsonFile = None,
    report: Report = True,
    log_to: LogTo = None,
    push_to_hub: PushToHub = None,
    private: Private = False,
    trust_remote_code: Trust = False,
) -> None:
    """Adapt QUANTIZED to an unlabelled test set. The result is a new checkpoint; QUANTIZED is not changed."""
    console.check_output(json)
    if push_to_hub:
        check_can_push(push_to_hub)

    from lrquant.calibration.text import check_sources
    from lrquant.entrypoints.adapt import adapt
    from lrquant.entrypoints.evaluate import evaluate
    from lrquant.reconstruction.callbacks import Callbacks
    from lrquant.report.observer import Observer

    check_sources(eval_ppl or ())
    observer = Observer() if report else None
    logged = {"quantized": quantized, "reference": reference, "data": data, "blocks": blocks, **settings}
    with console.watching("adapting") as progress, tracking(log_to or (), save_dir.name, logged) as trackers:
        adapted = adapt(
            quantized,
            reference,
            data,
            save_dir=save_dir,
            blocks=blocks,
            callback=Callbacks(progress, *trackers, *([observer] if observer else [])),
            device=device,
            trust_remote_code=trust_remote_code,
            **settings,
        )

    def measure(path: str, texts: Sequence[str], most: int | None) -> dict[str, "Perplexity"]:
        with console.counting(f"Measuring perplexity of {path}") as told:
            return evaluate(
                path,
                texts,
                adapted.recipe.seqlen,
                limit_windows=most,
                bos=adapted.recipe.bos,
                device=device,
                trust_remote_code=trust_remote_code,
                callback=told,
            )

    before, after = {}, {}
    if eval_ppl:
        before, after = measure(quantized, eval_ppl, limit_windows), measure(str(save_dir), eval_ppl, limit_windows)
    if observer is not None:
        from lrquant.entrypoints.reporting import Subject, report_adapted
        from lrquant.loading.pretrained import pick_device

        shown = before, after
        if not before:  # the report shows windows of the text itself in any case
            shown = measure(quantized, [data], REPORT_WINDOWS), measure(str(save_dir), [data], REPORT_WINDOWS)
        with console.status("Drawing the report"):
            metrics = metrics_of(*shown)
            subject = Subject(quantized, command_line(), pick_device(device), reference)
            report_adapted(adapted, observer, subject, metrics=metrics)
    rows = [[f"perplexity {name}", f"{before[name].value:.3f}", f"{after[name].value:.3f}"] for name in before]
    rows += [
        [
            f"block {record.index}, loss ({record.outcome_words})",
            f"{record.initial_loss:.4g}",
            f"{record.final_loss:.4g}",
        ]
        for record in adapted.records
    ]
    console.table(f"{save_dir}, adapted to {data}, {adapted.seconds:.1f} s", ["", "before", "after"], rows)
    console.write_json(
        json,
        {
            "quantized": quantized,
            "reference": reference,
            "saved_to": str(save_dir),
            "blocks": list(adapted.blocks),
            "seconds": adapted.seconds,
            "perplexity": {name: result.value for name, result in before.items()},
            "adapted_perplexity": {name: result.value for name, result in after.items()},
            "evaluation": {name: {"windows": r.windows, "seqlen": r.seqlen} for name, r in after.items()},
            "records": [record.as_dict() for record in adapted.records],
            "recipe": adapted.recipe.model_dump(),
        },
    )
    if push_to_hub:
        with console.status(f"Uploading to {push_to_hub}"):
            address = push(save_dir, push_to_hub, private)
        console.note(f"uploaded: {address}")
