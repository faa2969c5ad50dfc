"""`lrquant quantize`: a checkpoint in, a smaller checkpoint out."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lrquant.cli import console
from lrquant.cli.completion import calibration_names, format_names, method_names, model_names
from lrquant.cli.dry_run import show_estimate
from lrquant.cli.hub import check_can_push, push
from lrquant.cli.reporting import command_line, metrics_of
from lrquant.cli.results import figures, show
from lrquant.cli.tracking import Tracker, tracking
from lrquant.errors import UsageError

if TYPE_CHECKING:
    from lrquant.recipe import Recipe


class Shift(StrEnum):
    auto = "auto"
    on = "on"
    off = "off"


class Init(StrEnum):
    log = "log"
    smoothquant = "smoothquant"
    neutral = "neutral"


class Loss(StrEnum):
    mse = "mse"
    mse_nlc = "mse+nlc"
    balanced = "balanced"


class Schedule(StrEnum):
    constant = "constant"
    cosine = "cosine"


class Activations(StrEnum):
    auto = "auto"
    device = "device"
    host = "host"
    disk = "disk"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A hub name, a local folder, or zoo:NAME.", autocompletion=model_names),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Precision = Annotated[Dtype, typer.Option(help="Precision of the computation; auto: float32 on CPUs, else bfloat16.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write every figure to FILE.")]
Tasks = Annotated[
    str | None,
    typer.Option(metavar="A,B,…", help="lm-eval tasks: piqa,arc_easy,…; zoo:cloze and zoo:shapes-vqa are offline."),
]
NumFewshot = Annotated[
    int | None, typer.Option(min=0, help="Examples in a task's prompt.", show_default="the task's own")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only so many items of each task.")]
Report = Annotated[bool, typer.Option("--report/--no-report", help="Leave report.html beside the result.")]
LogTo = Annotated[
    list[Tracker] | None, typer.Option(help="Also write scalars there, by its own package; may be repeated.")
]
PushToHub = Annotated[
    str | None, typer.Option(metavar="USER/NAME", help="Then upload the result to this repository of the hub.")
]
Private = Annotated[bool, typer.Option("--private", help="Make the hub's repository a private one.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]


def quantize(
    model: Model,
    save_dir: Annotated[Path, typer.Option(metavar="DIR", help="Where the quantized checkpoint goes: a new folder.")],
    method: Annotated[
        str | None,
        typer.Option(
            help="rtn, smoothquant, omniquant, lrquant, lrquant+ or lrquant-max.",
            show_default="lrquant",
            autocompletion=method_names,
        ),
    ] = None,
    lr_plus: Annotated[bool, typer.Option("--lr-plus", "--lr_plus", help="The same as --method lrquant+.")] = False,
    paper_exact: Annotated[
        bool, typer.Option("--paper-exact", help="The method's setting as published, where ours differs.")
    ] = False,
    wbits: Annotated[int | None, typer.Option(help="Bits of a weight, 2 to 8.", show_default="4")] = None,
    abits: Annotated[
        int | None, typer.Option(help="Bits of an activation, 2 to 8; 16: weights only.", show_default="4")
    ] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(
            metavar="BITS",
            help="Bits of a weight on average, scales included: each linear gets what its errors ask for.",
            show_default="--wbits everywhere",
        ),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Input channels that share a scale.", show_default="a whole row")
    ] = None,
    symmetric: Annotated[bool | None, typer.Option("--symmetric/--asymmetric", help="Weight grids.")] = None,
    format: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            autocompletion=format_names,
            help="A format by name: fp8, fp8-static, fp8-block, fp8a16, nvfp4, nvfp4a16, mxfp4, mxfp4a16, mxfp8, "
            "mxfp8a16, w4a16-g128, w4a8-fp8, w8a8 or w4a8.",
            show_default="by the bits",
        ),
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Quantize the key-value cache with calibrated scales: fp8 or int8.",
            show_default="16 bits",
        ),
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|PATH",
            autocompletion=calibration_names,
            help="wikitext2, ptb, c4, zoo:pydoc, zoo:pycode, a text file or a folder; for models that see, a folder of "
            "pictures, zoo:shapes or a data set on the hub, a .jsonl file of pictures with text, zoo:shapes-vqa.",
        ),
    ] = None,
    towers: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Towers of a multimodal model: language, vision, or both with a comma between.",
            show_default="language",
        ),
    ] = None,
    also: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Parts outside the blocks to round too: head, projector, patch_embedding.",
            show_default="none",
        ),
    ] = None,
    nsamples: Annotated[int | None, typer.Option(help="Calibration samples.", show_default="128")] = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens per sample.", show_default="2048 or the model's most")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the samples per block.", show_default="6; lrquant-max: 24")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Samples per step.", show_default="4; lrquant-max: 8, fewer with fewer than 128 samples"),
    ] = None,
    lwc: Annotated[bool | None, typer.Option("--lwc/--no-lwc", help="Learn weight clipping.")] = None,
    let: Annotated[bool | None, typer.Option("--let/--no-let", help="Learn smoothing.")] = None,
    let_lr: Annotated[
        float | None, typer.Option(help="Learning rate of smoothing.", show_default="5e-3; more for fewer steps")
    ] = None,
    lwc_lr: Annotated[
        float | None, typer.Option(help="Learning rate of clipping.", show_default="1e-2; more for fewer steps")
    ] = None,
    init: Annotated[Init | None, typer.Option(help="How smoothing starts.")] = None,
    alpha: Annotated[float | None, typer.Option(help="SmoothQuant's migration strength.")] = None,
    schedule: Annotated[Schedule | None, typer.Option(help="How rates change over a block's steps.")] = None,
    rounding: Annotated[
        Literal["nearest", "learned", "gptq"] | None,
        typer.Option(help="To the nearest integer, by learned offsets, or by compensation (GPTQ)."),
    ] = None,
    rounding_lr: Annotated[
        float | None, typer.Option(help="Learning rate of rounding.", show_default="by the steps")
    ] = None,
    tuning_epochs: Annotated[
        int | None,
        typer.Option(
            help="Passes over the samples in which the whole model's scales and norms are learned at last.",
            show_default="0; lrquant-max, weights alone: 4",
        ),
    ] = None,
    early_stop: Annotated[
        float | None,
        typer.Option(help="Leave a block when two epochs lowered its loss by less than this share.", metavar="SHARE"),
    ] = None,
    orthogonal: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Rotate these before anything is learned: stream, values, and, at run time, down; auto: what is free.",
            show_default="none",
        ),
    ] = None,
    orthogonal_kind: Annotated[
        Literal["hadamard", "random"] | None,
        typer.Option(help="By Hadamard matrices with random signs, or by random orthogonal ones."),
    ] = None,
    loss: Annotated[Loss | None, typer.Option(help="Reconstruction loss.")] = None,
    two_branch: Annotated[
        bool | None,
        typer.Option("--two-branch/--no-two-branch", help="Also match the block's output on its own input."),
    ] = None,
    dynamic_loss: Annotated[
        bool | None, typer.Option("--dynamic-loss/--no-dynamic-loss", help="Weight loss terms by running averages.")
    ] = None,
    rotation: Annotated[
        bool | None, typer.Option("--rotation/--no-rotation", help="Learn rotation vectors on dequantized weights.")
    ] = None,
    rotation_rank: Annotated[
        int | None, typer.Option(metavar="K", help="Rank of the rotations; above 1 the export is dense.")
    ] = None,
    shift: Annotated[Shift | None, typer.Option(help="Learn shifts: where biases hold them, always, never.")] = None,
    quantize_attention: Annotated[
        bool | None,
        typer.Option("--quantize-attention/--no-quantize-attention", help="Round queries, keys and values too."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Decides samples and their order.", show_default="0")] = None,
    products: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="Precision of matrix products while learning.", show_default="what the machine is fast at"),
    ] = None,
    kernels: Annotated[
        Literal["eager", "compiled", "triton"] | None,
        typer.Option(help="How fake quantization runs while learning.", show_default="by the machine and the work"),
    ] = None,
    dtype: Precision = Dtype.auto,
    device: Device = "auto",
    eval_ppl: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|PATH", help="Then measure perplexity on this text; may be repeated."),
    ] = None,
    limit_windows: Annotated[int | None, typer.Option(min=1, help="Evaluate only so many windows.")] = None,
    tta: Annotated[
        bool, typer.Option("--tta", help="Also adapt to each evaluation text that is not the calibration text.")
    ] = False,
    tasks: Tasks = None,
    num_fewshot: NumFewshot = None,
    limit: Limit = None,
    statistics: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Start smoothing from channel statistics saved earlier.")
    ] = None,
    save_statistics: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save this run's channel statistics.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Start from a recipe.yaml; options given here change it.")
    ] = None,
    json: JsonFile = None,
    activations: Annotated[
        Activations, typer.Option(help="Where hidden states wait while blocks are learned.")
    ] = Activations.auto,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would read, write, hold and take; write nothing.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew; else an interrupted run of the same command goes on.")
    ] = False,
    report: Report = True,
    log_to: LogTo = None,
    push_to_hub: PushToHub = None,
    private: Private = False,
    trust_remote_code: Trust = False,
) -> None:
    """Quantize MODEL and save it as a checkpoint that transformers and vLLM load."""
    changes = {
        "wbits": wbits,
        "abits": abits,
        "target_bits": target_bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "kv_cache": kv_cache,
        "calibration": calib,
        "towers": towers and tuple(towers.split(",")),
        "also": also and tuple(also.split(",")),
        "nsamples": nsamples,
        "seqlen": seqlen,
        "epochs": epochs,
        "batch_size": batch_size,
        "lwc": lwc,
        "let": let,
        "let_lr": let_lr,
        "lwc_lr": lwc_lr,
        "init": init and init.value,
        "alpha": alpha,
        "schedule": schedule and schedule.value,
        "rounding": rounding,
        "rounding_lr": rounding_lr,
        "orthogonal": orthogonal and tuple(orthogonal.split(",")),
        "orthogonal_kind": orthogonal_kind,
        "tuning_epochs": tuning_epochs,
        "early_stop": early_stop,
        "loss": loss and loss.value,
        "two_branch": two_branch,
        "dynamic_loss": dynamic_loss,
        "rotation": True if rotation is None and rotation_rank else rotation,
        "rotation_rank": rotation_rank,
        "shift": shift and shift.value,
        "quantize_attention": quantize_attention,
        "seed": seed,
        "products": products,
        "kernels": kernels,
        "dtype": None if dtype is Dtype.auto else dtype.value,
    }
    console.check_json_path(json)
    if lr_plus and method not in (None, "lrquant", "lrquant+"):
        raise UsageError(f"--lr-plus is --method lrquant+, not {method}: give one of them")
    chosen = _recipe("lrquant+" if lr_plus else method, recipe, paper_exact, format, changes)

    if tta and not eval_ppl:
        raise UsageError("--tta adapts to evaluation texts: name at least one with --eval-ppl")

    if dry_run:
        show_estimate(model, chosen, device, activations.value, trust_remote_code, json)
        return
    if push_to_hub:
        check_can_push(push_to_hub)

    from lrquant.cli.after_adaptation import perplexity_after_adaptation
    from lrquant.cli.tasks import measure_tasks, show_tasks, split_tasks
    from lrquant.entrypoints.evaluate import evaluate
    from lrquant.entrypoints.quantize import quantize
    from lrquant.export import load_statistics, save_statistics_file
    from lrquant.reconstruction.callbacks import Callbacks
    from lrquant.report.observer import Observer
    from lrquant.runtime.distributed import leave

    wanted = split_tasks(tasks)
    given = load_statistics(statistics) if statistics else None
    first = console.speaks()
    observer = Observer() if report and first else None
    title = f"{chosen.method} {chosen.format_name}"
    asked = (log_to or ()) if first else ()
    with console.watching(title) as progress, tracking(asked, save_dir.name, chosen.model_dump()) as trackers:
        quantized = quantize(
            model,
            chosen,
            save_dir=save_dir,
            device=device,
            callback=Callbacks(progress, *trackers, *([observer] if observer else [])),
            statistics=given,
            trust_remote_code=trust_remote_code,
            restart=restart,
            activations=activations.value,
        )
        if save_statistics and first:
            save_statistics_file(save_statistics, quantized.result.statistics)
        measured, original = {}, {}
        if eval_ppl:
            how: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
            window = quantized.recipe.seqlen
            with console.counting("Measuring perplexity") as told:
                how |= {"limit_windows": limit_windows, "tokenizer": quantized.tokenizer, "callback": told}
                measured = evaluate(quantized.model, eval_ppl, window, **how)
                original = evaluate(model, eval_ppl, window, **how)
        leave()
        if not first:
            return
        adapted = {}
        if tta:
            texts = [text for text in eval_ppl or () if text != quantized.recipe.calibration]
            window = quantized.recipe.seqlen
            adapted = perplexity_after_adaptation(save_dir, model, texts, window, limit_windows, device)
        by_task = measure_tasks(quantized.model, quantized.tokenizer, wanted, num_fewshot, limit, device)
        for tracker in trackers:
            tracker.results({f"perplexity {name}": result.value for name, result in measured.items()})
    if observer is not None:
        from lrquant.entrypoints.reporting import Subject, report_quantized
        from lrquant.loading.pretrained import pick_device

        with console.status("Drawing the report"):
            metrics = metrics_of(original, measured, by_task)
            subject = Subject(model, command_line(), pick_device(device))
            report_quantized(quantized, observer, subject, metrics=metrics)
    show(quantized, measured, adapted, original, save_dir / "report.html" if report else None)
    show_tasks(by_task)
    values = figures(quantized, measured, adapted, original)
    console.write_json(json, {"model": model, **values, "tasks": by_task.results})
    if push_to_hub:
        with console.status(f"Uploading to {push_to_hub}"):
            address = push(save_dir, push_to_hub, private)
        console.note(f"uploaded: {address}")


def _recipe(
    method: str | None, file: Path | None, paper_exact: bool, format: str | None, changes: dict[str, Any]
) -> "Recipe":
    from lrquant.recipe import Recipe, with_format

    if file is None:
        return Recipe.preset(method or "lrquant", paper_exact, format, **changes)
    if method is not None or paper_exact:
        raise UsageError("give --recipe, or --method and --paper-exact, not both: the recipe says all of it")
    return Recipe.from_yaml(file).changed(**with_format(format, changes))
