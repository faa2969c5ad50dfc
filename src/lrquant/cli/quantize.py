"""`lrquant quantize`: quantize a model and save the checkpoint."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrquant.cli import console
from lrquant.cli.completion import FORMAT_NAMES, format_names, runtime_names
from lrquant.cli.dry_run import show_estimate
from lrquant.cli.hub import check_can_push, push
from lrquant.cli.options import (
    Device,
    JsonFile,
    Limit,
    LogTo,
    Model,
    NumFewshot,
    Private,
    PushToHub,
    Report,
    Tasks,
    Trust,
)
from lrquant.cli.reporting import command_line, metrics_of
from lrquant.cli.results import figures, show
from lrquant.cli.settings import takes_settings
from lrquant.cli.tracking import tracking
from lrquant.errors import LrquantError, UsageError

if TYPE_CHECKING:
    from lrquant.recipe import Recipe

EXAMPLES = """\
Examples:

  4-bit weights for vLLM, with an offline calibration set:

    lrquant quantize MODEL --format w4a16-g128 --calib zoo:pydoc

  4-bit weights and activations with the best method, and perplexity before and after:

    lrquant quantize MODEL --method lrquant-max --eval-ppl wikitext2

  Estimate size, time and memory without quantizing:

    lrquant quantize MODEL --wbits 2 --abits 16 --group-size 64 --dry-run
"""


class Activations(StrEnum):
    """Where hidden states can be kept."""

    auto = "auto"
    device = "device"
    host = "host"
    disk = "disk"


@takes_settings(epilog=EXAMPLES)
def quantize(
    model: Model,
    settings: dict[str, Any],
    save_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The folder for the quantized checkpoint; it must not exist yet.",
            show_default="MODEL-FORMAT in the current folder",
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Use a recipe.yaml; other options override it.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Estimate size, memory and time; write nothing.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start over instead of resuming an interrupted run of the same command.")
    ] = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    format: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            autocompletion=format_names,
            help=f"Number format by name: {', '.join(FORMAT_NAMES)}.",
            show_default="set by the options below",
        ),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="PROGRAM",
            autocompletion=runtime_names,
            help="Choose settings for this program: vllm, vllm-cpu, sglang, llama.cpp, transformers.",
            show_default="no particular program",
        ),
    ] = None,
    statistics: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Use saved channel statistics for the initial smoothing scales.")
    ] = None,
    save_statistics: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save the channel statistics of this run.")
    ] = None,
    lr_plus: Annotated[bool, typer.Option("--lr-plus", "--lr_plus", help="Short for --method lrquant+.")] = False,
    paper_exact: Annotated[
        bool, typer.Option("--paper-exact", help="Use the method's published settings where the defaults differ.")
    ] = False,
    device: Device = "auto",
    activations: Annotated[
        Activations, typer.Option(help="Where hidden states are kept during the run.")
    ] = Activations.auto,
    trust_remote_code: Trust = False,
    eval_ppl: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|PATH", help="Measure perplexity on this text afterwards; can be repeated."),
    ] = None,
    limit_windows: Annotated[int | None, typer.Option(min=1, help="Evaluate at most N windows.")] = None,
    tta: Annotated[
        bool, typer.Option("--tta", help="Also adapt to each evaluation text that is not the calibration text.")
    ] = False,
    tasks: Tasks = None,
    num_fewshot: NumFewshot = None,
    limit: Limit = None,
    report: Report = True,
    json: JsonFile = None,
    log_to: LogTo = None,
) -> None:
    """Quantize MODEL and save it as a checkpoint that transformers and vLLM load.

    Without options, it chooses a format, a method and a calibration set, and prints its choice.
    """
    console.check_output(json)
    console.check_output(save_statistics, "--save-statistics")
    if recipe is None:
        asked_for = runtime or format or lr_plus or paper_exact
        settings = _completed(settings, model, device, format_too=not asked_for, trust_remote_code=trust_remote_code)
    settings = _for_runtime(settings, recipe, format, runtime=runtime)
    chosen = _recipe(settings, recipe, lr_plus, paper_exact, None if runtime else format)
    if runtime is None:
        _warn_of_unserved(chosen)
    save_dir = save_dir or default_folder(model, chosen)

    if eval_ppl:
        from lrquant.calibration.text import check_sources

        check_sources(eval_ppl)
    if tta and not eval_ppl:
        raise UsageError("--tta adapts to evaluation texts: give at least one with --eval-ppl")

    if dry_run:
        show_estimate(
            model,
            chosen,
            save_dir,
            activations=activations.value,
            device=device,
            trust_remote_code=trust_remote_code,
            json=json,
        )
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
            try:
                save_statistics_file(save_statistics, quantized.result.statistics)
            except LrquantError as error:  # the checkpoint is whole, and its figures are worth more
                console.note(str(error))
        measured, original = {}, {}
        if eval_ppl:
            how: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
            window = quantized.recipe.seqlen
            with console.counting("Measuring perplexity") as told:
                how |= {"limit_windows": limit_windows, "tokenizer": quantized.tokenizer, "callback": told}
                how["bos"] = quantized.recipe.bos
                measured = evaluate(quantized.model, eval_ppl, window, **how)
                original = evaluate(model, eval_ppl, window, **how)
        leave()
        if not first:
            return
        adapted = {}
        if tta:
            texts = [text for text in eval_ppl or () if text != quantized.recipe.calibration]
            adapted = perplexity_after_adaptation(save_dir, model, texts, quantized.recipe, limit_windows, device)
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
    try:
        if push_to_hub:
            with console.status(f"Uploading to {push_to_hub}"):
                address = push(save_dir, push_to_hub, private)
            console.note(f"uploaded: {address}")
    finally:
        console.write_json(json, {"model": model, **values, "tasks": by_task.results})


def default_folder(model: str, recipe: "Recipe") -> Path:
    """The default folder of a result, such as `llama-w4a16-g128`, in the current folder."""
    name = Path(model).resolve().name if Path(model).exists() else model.rpartition("/")[2].rpartition(":")[2]
    return Path(f"{name}-{recipe.format_name.lower().replace(' ', '-')}")


def _completed(
    given: dict[str, Any], model: str, device: str, *, format_too: bool, trust_remote_code: bool
) -> dict[str, Any]:
    """`given` with a calibration set, and with a format and a method if it has none of them; a note says so."""
    from lrquant.entrypoints.defaults import DEFAULT_CALIBRATION, chosen_calibration, chosen_format, decides
    from lrquant.loading.pretrained import load_config, pick_device

    found: dict[str, Any] = {}
    format_too = format_too and not decides(given)
    words = []
    if format_too or "calibration" not in given:
        config = load_config(model, trust_remote_code)
        if format_too:
            found, why = chosen_format(config, pick_device(device).type)
            words.append(why)
        if "calibration" not in given:
            found["calibration"], why = chosen_calibration(config)
            if format_too or found["calibration"] != DEFAULT_CALIBRATION:
                words.append(why)
    if words:
        console.note(f"Chosen: {', '.join(words)}.")
    return found | given


def _for_runtime(
    given: dict[str, Any], file: Path | None, format: str | None, *, runtime: str | None
) -> dict[str, Any]:
    """`given` with settings that make the result run in `runtime`; the bits can come from a recipe's file."""
    if runtime is None:
        return given
    from lrquant.method_presets import with_format
    from lrquant.recipe import Recipe
    from lrquant.runtimes.choice import settings_for

    asked = with_format(format, given)
    if file is not None and "wbits" not in asked and "abits" not in asked:
        base = Recipe.from_yaml(file)
        asked |= {"wbits": base.wbits, "abits": base.abits, "group_size": base.group_size, "numbers": base.numbers}
    return settings_for(runtime, asked)


def _warn_of_unserved(recipe: "Recipe") -> None:
    """Print a note, before any work, if no program runs the format."""
    from lrquant.runtimes.choice import nearest_served
    from lrquant.runtimes.planned import format_of_recipe
    from lrquant.runtimes.table import served

    stored = format_of_recipe(recipe)
    if not served(stored):
        near = nearest_served(stored)
        console.note(
            f"{recipe.format_name}: no program runs this format; it can only be simulated. Programs run {near}."
        )


def _recipe(given: dict[str, Any], file: Path | None, lr_plus: bool, paper_exact: bool, format: str | None) -> "Recipe":
    """The recipe given by the options; `given` has the values of its fields."""
    from lrquant.method_presets import with_format
    from lrquant.recipe import Recipe

    method = given.pop("method", None)
    if lr_plus and method not in (None, "lrquant", "lrquant+"):
        raise UsageError(f"--lr-plus means --method lrquant+, not {method}: give one of the two")
    method = "lrquant+" if lr_plus else method
    if "rotation_rank" in given:
        given.setdefault("rotation_vectors", True)
    if file is None:
        return Recipe.preset(method or "lrquant", paper_exact, format, **given)
    if method is not None or paper_exact:
        raise UsageError("give --recipe, or --method and --paper-exact, not both: the recipe includes the method")
    return Recipe.from_yaml(file).changed(**with_format(format, given))
