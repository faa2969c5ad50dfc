"""The command lines of the LRQuant papers, implemented with the same functions as `lrquant`.

Options have the published names (underscores and dashes are equivalent) and defaults, with the papers' settings
(`Recipe.preset(…, paper_exact=True)`). Statistics and learned parameters are safetensors files.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrquant.cli import console
from lrquant.cli.options import interruptible
from lrquant.errors import LrquantError, UsageError

if TYPE_CHECKING:
    from lrquant.reconstruction.records import BlockRecord

log = logging.getLogger("lrquant")

EVALUATION_TEXTS = ("wikitext2", "ptb", "c4")
SCALES_DIR, SHIFTS_DIR = Path("./act_scales"), Path("./act_shifts")
PARAMETERS_FILE = "lrquant_parameters.safetensors"

ModelOption = Annotated[str, typer.Option(metavar="MODEL", help="A local folder, a hub name or zoo:NAME.")]
CalibOption = Annotated[
    str, typer.Option("--calib_dataset", metavar="NAME|PATH", help="wikitext2, ptb, c4, zoo:pydoc, or a text file.")
]


def run_published(command: Callable[..., None]) -> None:
    """Run `command` as a program of its own, with lrquant's errors and exit codes."""
    from lrquant.cli.main import run

    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"token_normalize_func": lambda name: name.replace("-", "_")},
    )
    app.command()(interruptible(command))
    run(app)


def statistics(
    model: ModelOption,
    scales_output_path: Annotated[Path, typer.Option(help="Folder for the maximum of each channel.")] = SCALES_DIR,
    shifts_output_path: Annotated[Path, typer.Option(help="Folder for the midpoint of each channel.")] = SHIFTS_DIR,
    calib_dataset: CalibOption = "wikitext2",
    num_samples: Annotated[int, typer.Option(min=1, help="Calibration samples.")] = 128,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per sample.")] = 2048,
    seed: Annotated[int, typer.Option(help="Decides the samples.")] = 2,
) -> None:
    """Collect activation statistics of MODEL's linears."""
    from lrquant.architectures import family_of
    from lrquant.calibration import calibration_samples
    from lrquant.export.statistics_file import save_statistics_file
    from lrquant.loading.pretrained import compute_dtype, load_model, load_tokenizer, pick_device
    from lrquant.reconstruction.block_statistics import gather_statistics

    on = pick_device("auto")
    loaded = load_model(model, compute_dtype("auto", on))
    seqlen = min(seq_len, getattr(loaded.config, "max_position_embeddings", None) or seq_len)
    samples = calibration_samples(load_tokenizer(model), calib_dataset, num_samples, seqlen, seed)
    calls = [{"input_ids": row, "use_cache": False} for row in samples]
    with console.status("Gathering statistics"):
        gathered = gather_statistics(loaded, family_of(loaded), calls, device=on)
    for folder, kind in ((scales_output_path, "absmax"), (shifts_output_path, "midpoint")):
        folder.mkdir(parents=True, exist_ok=True)
        save_statistics_file(folder / f"{_short(model)}.safetensors", gathered, (kind,))
        console.out.print(f"{kind} of {len(gathered)} blocks: {folder / _short(model)}.safetensors", markup=False)


def quantize(
    model: ModelOption,
    output_dir: Annotated[
        Path, typer.Option("--output_dir", help="Folder for the log, the learned parameters and results.json.")
    ] = Path("./log"),
    save_dir: Annotated[
        Path | None, typer.Option("--save_dir", help="Folder for the quantized checkpoint.", show_default="not saved")
    ] = None,
    cache_dir: Annotated[Path, typer.Option("--cache_dir", help="Cache folder of data sets.")] = Path("./cache"),
    resume: Annotated[Path | None, typer.Option(metavar="FILE", help="Start from saved parameters.")] = None,
    calib_dataset: CalibOption = "wikitext2",
    nsamples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens per sample.", show_default="2048, or the model's maximum")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", help="Samples per step.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the samples and their order.")] = 2,
    tasks: Annotated[str, typer.Option(metavar="A,B,…", help="lm-eval tasks.")] = "",
    eval_ppl: Annotated[
        bool, typer.Option("--eval_ppl", help=f"Measure perplexity on {', '.join(EVALUATION_TEXTS)}.")
    ] = False,
    eval_ppl_data: Annotated[
        list[str] | None,
        typer.Option(
            "--eval_ppl_data",
            metavar="NAME|PATH …",
            help="Evaluation texts instead of these, separated by spaces or commas.",
        ),
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,  # texts after --eval_ppl_data's first
    num_fewshot: Annotated[int, typer.Option("--num_fewshot", min=0, help="Few-shot examples in a task's prompt.")] = 0,
    wbits: Annotated[int, typer.Option(help="Bits of a weight.")] = 4,
    abits: Annotated[int, typer.Option(help="Bits of an activation; 16: weight-only.")] = 4,
    group_size: Annotated[int | None, typer.Option("--group_size", help="Input channels that share a scale.")] = None,
    alpha: Annotated[float, typer.Option(help="SmoothQuant's migration strength.")] = 0.5,
    let_lr: Annotated[float, typer.Option("--let_lr", help="Learning rate of smoothing.")] = 5e-3,
    lwc_lr: Annotated[float, typer.Option("--lwc_lr", help="Learning rate of clipping.")] = 1e-2,
    epochs: Annotated[int, typer.Option(help="Passes over the samples per block.")] = 10,
    let: Annotated[bool, typer.Option("--let", help="Learn smoothing.")] = False,
    lwc: Annotated[bool, typer.Option("--lwc", help="Learn weight clipping.")] = False,
    lr_plus: Annotated[bool, typer.Option("--lr_plus", help="LRQuant+.")] = False,
    tta: Annotated[
        bool, typer.Option("--tta", help="Adapt to each evaluation text that is not the calibration text.")
    ] = False,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Symmetric weight grids.")] = False,
    limit: Annotated[int, typer.Option(help="At most N windows and task items; -1: all.")] = -1,
    act_scales: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Maxima.", show_default=f"{SCALES_DIR}/MODEL.safetensors, if there"),
    ] = None,
    act_shifts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Midpoints.", show_default=f"{SHIFTS_DIR}/MODEL.safetensors, if there"),
    ] = None,
) -> None:
    """Quantize MODEL by LRQuant or LRQuant+ with the papers' settings, and evaluate it."""
    from lrquant.recipe import Recipe

    if epochs and not (let or lwc):
        raise UsageError(f"--epochs {epochs} would learn nothing: give --lwc, --let or both, or --epochs 0")
    recipe = Recipe.preset(
        "lrquant+" if lr_plus else "lrquant",
        paper_exact=True,
        wbits=wbits,
        abits=abits,
        group_size=group_size,
        symmetric=symmetric,
        let=let,
        lwc=lwc,
        alpha=alpha,
        epochs=epochs,
        batch_size=batch_size,
        let_lr=let_lr,
        lwc_lr=lwc_lr,
        calibration=calib_dataset,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
    )
    if lwc and not let and abits < 16:
        console.note(f"activations are quantized to {abits} bits, as asked; weight-only is --abits 16")
    os.environ.setdefault("HF_DATASETS_CACHE", str(cache_dir))  # read when `datasets` is imported, below

    from lrquant.cli.after_adaptation import perplexity_after_adaptation
    from lrquant.cli.results import figures, show
    from lrquant.cli.tasks import measure_tasks, show_tasks, split_tasks
    from lrquant.entrypoints.evaluate import evaluate
    from lrquant.entrypoints.quantize import quantize as quantize_model
    from lrquant.export import load_learned, save_learned

    if more and not eval_ppl_data:
        raise UsageError(f"{more[0]!r} is not an option; evaluation texts follow --eval_ppl_data")
    names = [name for given in (*(eval_ppl_data or ()), *(more or ())) for name in given.split(",")]
    wanted, most = split_tasks(tasks), None if limit < 0 else limit
    texts = _reachable(names or (EVALUATION_TEXTS if eval_ppl or tta else ()))
    start_from = load_learned(resume) if resume else None
    given = _statistics(model, act_scales, act_shifts) if let else None
    output_dir.mkdir(parents=True, exist_ok=True)
    with _logging_to(output_dir / "log.txt"), tempfile.TemporaryDirectory() as temporary:
        log.info("%s, recipe:\n%s", model, recipe.to_yaml())
        target = save_dir or (Path(temporary) / "quantized" if tta else None)
        with _logged_progress(f"{recipe.method} {recipe.format_name}") as progress:
            quantized = quantize_model(
                model, recipe, save_dir=target, callback=progress, statistics=given, start_from=start_from
            )
        save_learned(output_dir / PARAMETERS_FILE, quantized.result.learned, quantized.recipe)
        quantized.recipe.to_yaml(output_dir / "recipe.yaml")
        window = quantized.recipe.seqlen
        measured = evaluate(
            quantized.model, texts, window, limit_windows=most, tokenizer=quantized.tokenizer, bos="off"
        )
        adapted = {}
        if tta and target:
            others = [text for text in texts if text != calib_dataset]
            adapted = perplexity_after_adaptation(target, model, others, quantized.recipe, most, "auto")
        by_task = measure_tasks(quantized.model, quantized.tokenizer, wanted, num_fewshot, most, "auto")
        values = {"model": model, **figures(quantized, measured, adapted), "tasks": by_task.results}
        values["saved_to"] = str(save_dir) if save_dir else None
        console.write_json(output_dir / "results.json", values)
        log.info("results: %s, adapted: %s", values["perplexity"], values["adapted_perplexity"])
    show(quantized, measured, adapted)
    show_tasks(by_task)


def _short(model: str) -> str:
    return Path(model).resolve().name if Path(model).exists() else model.rpartition("/")[2].replace(":", "-")


def _reachable(names: Any) -> list[str]:
    """The texts that can be read; a line explains each of the others."""
    from lrquant.calibration import read_text

    found = []
    for name in names:
        try:
            read_text(name, train=False)
            found.append(name)
        except UsageError:
            raise
        except LrquantError as error:
            console.note(f"no perplexity on {name}: {error}")
    return found


def _statistics(model: str, scales: Path | None, shifts: Path | None) -> Any:
    """Statistics from the given files, or from those that generate_act_scale_shift.py leaves; else None."""
    from lrquant.export import load_statistics

    chosen = [
        scales or SCALES_DIR / f"{_short(model)}.safetensors",
        shifts or SHIFTS_DIR / f"{_short(model)}.safetensors",
    ]
    if not (scales or shifts) and not all(path.is_file() for path in chosen):
        return None
    console.note(f"statistics of {' and '.join(map(str, chosen))}")
    return load_statistics(*chosen)


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """A context in which lrquant's log is also appended to `path`."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    before, log.level = log.level, logging.INFO
    try:
        yield
    finally:
        log.setLevel(before)
        log.removeHandler(handler)
        handler.close()


@contextmanager
def _logged_progress(title: str) -> Iterator[console.BlockProgress]:
    """The usual progress, and a line of the log for each block."""

    class Logged(console.BlockProgress):
        def block_done(self, record: "BlockRecord") -> None:
            log.info("block %d: %s", record.index, record.as_dict())
            super().block_done(record)

    progress = Logged(title)
    try:
        yield progress
    finally:
        progress.stop()
