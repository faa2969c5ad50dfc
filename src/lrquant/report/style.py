"""Figures as SVG in the style of the page: its fonts, its light and dark colours, its width.

Matplotlib draws with stand-in colours, and every stand-in is then replaced by a CSS variable of the page. Text stays
text, so a figure can be searched and read aloud, and weighs little.
"""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

INK, MUTED, GRID = "#010101", "#020202", "#030303"
PLAIN, START, FINAL, INHERITED, WARN = "#110001", "#110002", "#110003", "#110004", "#110005"
SERIES = (FINAL, START, WARN, INHERITED, PLAIN)  # for things without a fixed meaning
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    PLAIN: "var(--plain)",
    START: "var(--start)",
    FINAL: "var(--final)",
    INHERITED: "var(--inherited)",
    WARN: "var(--warn)",
}
_BETWEEN = "#1200"  # and two digits: the share, in percent, of FINAL in a mixture with START
WIDTH = 5.2  # inches; at the width of a phone the text keeps nearly its size

_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lrquant",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}


def between(share: float) -> str:
    """The stand-in of a colour on the way from START (0) to FINAL (1)."""
    return f"{_BETWEEN}{round(99 * share):02d}"


@contextmanager
def drawing() -> Iterator[None]:
    """Within, figures are drawn in the report's style."""
    with mpl.rc_context(_SETTINGS):  # type: ignore[arg-type]  # newer stubs list every name
        yield


def canvas(height: float, rows: int = 1, columns: int = 1, **how: Any) -> tuple[Figure, Any]:
    """A figure of the page's width and its axes (one, or an array)."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **how)


def plain_log_ticks(axes: Axes, which: str = "y") -> None:
    """Numbers such as 0.02 on a logarithmic axis, few enough to be read."""
    for axis in (axes.xaxis, axes.yaxis) if which == "both" else (getattr(axes, f"{which}axis"),):
        low, high = sorted(axis.get_view_interval())
        ratio = high / low if low > 0 else np.inf
        if ratio < 4:  # too few powers of ten, and of their multiples
            axis.set_major_locator(MaxNLocator(4))
        else:
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if ratio < 30 else (1.0,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def to_svg(figure: Figure, name: str, description: str, colours: Mapping[str, str] = VARIABLES) -> str:
    """`figure` as an SVG element; `name` keeps its ids apart from other figures', `description` is read aloud.

    `colours` maps stand-in colours to what is written in their place.
    """
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for stand_in, colour in colours.items():
        svg = svg.replace(stand_in, colour)
    final, start = colours.get(FINAL, FINAL), colours.get(START, START)
    svg = re.sub(rf"{_BETWEEN}(\d\d)", rf"color-mix(in srgb, {final} \1%, {start})", svg)
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
