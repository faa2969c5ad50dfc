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
    """Write the report of the run in `directory` from the data there; returns its path.

    Raises:
        UsageError: there is no such data.
    """
    run, measurements = load_run(directory)
    return _write(
        output or directory / PAGE, _environment().get_template("report.html.j2").render(_page(run, measurements))
    )


def write_comparison(directories: Sequence[Path], output: Path) -> Path:
    """Write one page that compares several runs."""
    loaded = [load_run(directory)[0] for directory in directories]
    names = _distinct_names(directories)
    runs = list(zip(names, loaded, strict=True))
    with drawing():
        drawn = [
            _drawn(f"compare-{kind}", figures.compared_depth(runs, kind, SERIES), title, caption)
            for kind, title, caption in (
                (
                    "end",
                    "Error over depth",
                    "Relative error of each run's hidden states after each block.",
                ),
                ("own", "Error of each block by itself", "Each quantized block on the full-precision input."),
                (
                    "plain",
                    "Error of plain rounding",
                    "The same blocks without smoothing, clipping or learning.",
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
    functions = (display_name, change, own_error, stands_out)
    environment.globals |= {function.__name__: function for function in functions}
    return environment


def display_name(model: str) -> str:
    """A model's name for people: a folder without the folders above it, a name on the hub as it is."""
    parts = [part for part in model.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    is_path = model.startswith(("/", ".", "~")) or "\\" in model or len(parts) > 2
    return parts[-1] if is_path and parts else model


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
        "name": display_name(run.model),
        "title": f"{display_name(run.model)} in {run.format}, {run.method}",
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
                "Change of perplexity by window",
                "Each bar is one window of the evaluation text. Below zero, the new model finds the text more likely.",
            ),
            _drawn("pairs", figures.window_pairs(run), "Perplexity over the text", "Lower is better."),
        ]
        blocks = [
            _drawn(
                "depth",
                figures.depth(run),
                "Error over depth",
                "Mean over tokens of |ŷ − y| / |y|, ŷ the quantized model's hidden states, y the original's.",
            ),
            _drawn(
                "steps",
                figures.steps(run),
                "Gain of smoothing and learning",
                "Below 100 %, the block is closer to the original than with plain rounding, on the same input.",
            ),
            _drawn(
                "cosine",
                figures.cosine(run),
                "Direction of the output",
                "Lower is closer. The next block's norm keeps only the direction of a hidden state.",
            ),
            _drawn(
                "losses",
                figures.losses(run),
                "Loss over epochs",
                "Falling lines mean that learning helps. Blocks that need attention are in the warning colour.",
            ),
        ]
        layers = [
            _drawn(
                "sensitivity",
                figures.sensitivity(run),
                "Sensitivity of single layers",
                "The block's output error when only this layer's weight and input are quantized.",
            ),
        ]
        inside = [
            _drawn(
                "outliers",
                figures.outliers(run),
                "Outlier channels before and after smoothing",
                "One point per input of a linear. At a ratio of 1 all channels would be equally large.",
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
                        "Bright vertical lines are outlier channels: they make the quantization of all others coarser.",
                    )
                )
        inside.append(
            _drawn(
                "scales",
                figures.scales(run, measurements),
                "Learned scales and their initial values",
                "A point is a channel; on the diagonal its scale did not change. Dark: first blocks; light: last.",
            )
        )
        for block in chosen[:2]:
            inside.append(
                _drawn(
                    f"weights{block.index}",
                    figures.weights(block, measurements),
                    f"Weights of block {block.index} and their clipped range",
                    "Logarithmic histograms. Lines: mean ends of the clipped range. Bands: the ends of most groups.",
                )
            )
    return [
        (title, text, [picture for picture in drawn if picture])
        for title, text, drawn in (
            ("Results", "", results),
            (
                "Block by block",
                "A transformer is a stack of blocks. Each block is quantized after the blocks before it.",
                blocks,
            ),
            ("Layers", "", layers),
            (
                "Inside",
                "A few blocks: the hardest, the one with the strongest outliers, and the first or a middle one.",
                inside,
            ),
        )
        if any(drawn)
    ]
