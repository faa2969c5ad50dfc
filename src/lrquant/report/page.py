"""The report as one self-contained page: jinja2, inlined style, inlined SVG, no script, nothing fetched."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lrquant.errors import LrquantError
from lrquant.report import figures
from lrquant.report.findings import change, findings, hardest_block, own_error, stands_out
from lrquant.report.run import PAGE, Run, load_run, write_whole
from lrquant.report.style import SERIES, drawing, to_svg


@dataclass(frozen=True)
class Picture:
    """A figure on the page and the sentence under it."""

    title: str
    svg: Markup
    caption: str


def write_report(directory: Path, output: Path | None = None) -> Path:
    """Make the page of the run in `directory` (again), from the data that lies there; returns where it is.

    Raises:
        UsageError: there is no such data.
    """
    run, measurements = load_run(directory)
    return _write(
        output or directory / PAGE, _environment().get_template("report.html.j2").render(_page(run, measurements))
    )


def write_comparison(directories: Sequence[Path], output: Path) -> Path:
    """One page that holds several runs against each other."""
    loaded = [load_run(directory)[0] for directory in directories]
    names = _distinct_names(directories)
    runs = list(zip(names, loaded, strict=True))
    with drawing():
        drawn = [
            _drawn(f"compare-{kind}", figures.compared_depth(runs, kind, SERIES), title, caption)
            for kind, title, caption in (
                (
                    "end",
                    "Error along the depth",
                    "How far each run's hidden states are from the original's after each block.",
                ),
                ("own", "What each block adds by itself", "Each quantized block on the original's own input."),
                (
                    "plain",
                    "Plain rounding of the same blocks",
                    "Without smoothing, clipping or learning: the starting point.",
                ),
            )
        ]
    metrics = list(dict.fromkeys(metric.name for run in loaded for metric in run.metrics))
    page = {
        "title": f"{len(runs)} runs compared",
        "runs": runs,
        "metrics": metrics,
        "values": {name: {metric.name: metric for metric in run.metrics} for name, run in runs},
        "pictures": [picture for picture in drawn if picture],
        "hardest": {name: hardest_block(run) for name, run in runs},
        "findings": {name: findings(run) for name, run in runs},
    }
    return _write(output, _environment().get_template("comparison.html.j2").render(page))


def _write(path: Path, text: str) -> Path:
    try:
        write_whole(path, text)
    except OSError as error:
        raise LrquantError(f"{path}: cannot be written ({error.strerror})") from None
    return path


def _distinct_names(directories: Sequence[Path]) -> list[str]:
    """Folder names, or whole paths where two are called the same."""
    names = [directory.resolve().name for directory in directories]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, directories, strict=True)]


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lrquant.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "megabytes": lambda count: f"{count / 1e6:.1f} MB",
        "duration": _duration,
    }
    environment.globals |= {"change": change, "own_error": own_error, "stands_out": stands_out}
    return environment


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _page(run: Run, measurements: figures.Measurements) -> dict[str, Any]:
    return {
        "title": f"{run.model} in {run.format}, {run.method}",
        "run": run,
        "recipe": yaml.safe_dump(run.recipe, sort_keys=False),
        "findings": findings(run),
        "hardest": hardest_block(run),
        "sections": _sections(run, measurements),
    }


def _drawn(name: str, figure: Any, title: str, caption: str) -> Picture | None:
    return None if figure is None else Picture(title, Markup(to_svg(figure, name, f"{title}. {caption}")), caption)


def _sections(run: Run, measurements: figures.Measurements) -> list[tuple[str, str, list[Picture]]]:
    """(title, introduction, pictures) of every section that has pictures."""
    with drawing():
        results = [
            _drawn("methods", figures.methods(run), "Methods compared", "The same model, format and samples."),
            _drawn(
                "windows",
                figures.windows(run),
                f"What {'adaptation' if run.kind == 'adapt' else 'quantization'} changed, window by window",
                "A bar is one window of text; below zero the model finds its text more likely than before.",
            ),
            _drawn("pairs", figures.window_pairs(run), "Before and after, in the text's order", "Lower is better."),
        ]
        blocks = [
            _drawn(
                "depth",
                figures.depth(run),
                "Error along the depth",
                "Mean over tokens of |ŷ − y| / |y|, ŷ the quantized model's hidden states, y the original's.",
            ),
            _drawn(
                "steps",
                figures.steps(run),
                "What smoothing and learning bought",
                "Below 100 %: better than rounding every number to its nearest. All on the same input.",
            ),
            _drawn(
                "cosine",
                figures.cosine(run),
                "Direction of the output",
                "Lower is closer. A norm reads a hidden state by its direction.",
            ),
            _drawn(
                "losses",
                figures.losses(run),
                "Loss while learning",
                "Falling lines: learning helps. Blocks that were set back are in the warning colour.",
            ),
        ]
        layers = [
            _drawn(
                "sensitivity",
                figures.sensitivity(run),
                "Sensitivity of single layers",
                "The block's output error when this layer alone, its weight and its input, is quantized.",
            ),
        ]
        inside = [
            _drawn(
                "outliers",
                figures.outliers(run),
                "Outlier channels before and after smoothing",
                "One point per input of a linear. A ratio of 1 would mean that all channels are equally large.",
            )
        ]
        chosen = figures.chosen_blocks(run)
        for block in chosen:
            layer = figures.mapped_layer(block, measurements)
            if layer is not None:
                inside.append(
                    _drawn(
                        f"map{block.index}",
                        figures.activations(block, layer, measurements),
                        f"Block {block.index}, input of {layer}",
                        "Bright vertical lines are outlier channels: they coarsen the grid for every other channel.",
                    )
                )
        inside.append(
            _drawn(
                "scales",
                figures.scales(run, measurements),
                "Learned scales against their start",
                "A point is a channel; on the line it did not move. Dark: first block, light: last.",
            )
        )
        for block in chosen[:2]:
            inside.append(
                _drawn(
                    f"weights{block.index}",
                    figures.weights(block, measurements),
                    f"Weights of block {block.index} and their clipped range",
                    "Logarithmic histograms. Lines: mean ends of the range that the grid covers; bands: most groups.",
                )
            )
    return [
        (title, text, [picture for picture in drawn if picture])
        for title, text, drawn in (
            ("Results", "", results),
            (
                "Block by block",
                "A transformer is a stack of blocks; each is quantized after the ones before it.",
                blocks,
            ),
            ("Layers", "", layers),
            (
                "Inside",
                "Shown for a few blocks: the hardest, the one with the strongest outliers, the first or a middle one.",
                inside,
            ),
        )
        if any(drawn)
    ]
