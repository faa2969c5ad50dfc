"""The report as one self-contained page: jinja2, inlined style, inlined SVG, no script, nothing fetched."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from lrquant.errors import LrquantError
from lrquant.report import figures
from lrquant.report.findings import change, findings, hardest_block, own_error, stands_out
from lrquant.report.run import PAGE, Run, load_run, write_whole
from lrquant.report.sections import picture, sections
from lrquant.report.style import SERIES, drawing


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
            picture(f"compare-{kind}", figures.compared_depth(runs, kind, SERIES), title=title, caption=caption)
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
        "pictures": [each for each in drawn if each],
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
        "sections": sections(run, measurements),
    }
