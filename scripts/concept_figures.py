"""Draw the figures of README.md and docs/concepts.md with lrquant's own functions: `python scripts/concept_figures.py`.

A test draws them again and compares what is written in them.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from lrquant.formats import Factors, fake_quantize_weight
from lrquant.formats.integers import integers
from lrquant.report.style import FINAL, GRID, INHERITED, INK, MUTED, PLAIN, START, WARN, canvas, drawing, to_svg
from lrquant.transforms.smoothing import log_scale, smoothquant_scale

RESULTS = Path(__file__).parents[1] / "benchmarks" / "peers" / "results.jsonl"
COMPARED = {  # method in the results: label, colour, marker
    "lrquant-max": ("lrquant-max", FINAL, "o"),
    "auto-round/default": ("AutoRound", START, "s"),
    "llm-compressor/gptq": ("GPTQ", INHERITED, "^"),
    "llm-compressor/awq": ("AWQ", WARN, "D"),
    "llm-compressor/rtn": ("round to nearest", PLAIN, "x"),
}
FOLDER = Path(__file__).parents[1] / "docs" / "figures"
COLOURS = {  # that can be read on white and on black: a picture in a page does not know the page's theme
    INK: "#7d8590",
    MUTED: "#7d8590",
    GRID: "#7d859040",
    PLAIN: "#8a8f98",
    START: "#c98a1b",
    FINAL: "#2f81d6",
    INHERITED: "#8a5cc4",
    WARN: "#c4314b",
}


def rounded(values: torch.Tensor, bits: int, clip: float = 1.0) -> torch.Tensor:
    """One row of `values` rounded to its grid, whose range is `clip` times the row's."""
    factor = torch.full((1, 1, 1), clip)
    return fake_quantize_weight(values[None], integers(bits), Factors(clip_low=factor, clip_high=factor))[0]


def outlier() -> Figure:
    """One outlier makes the steps coarse for all."""
    values = torch.linspace(-1, 1, 400)
    with_outlier = torch.cat([values, torch.tensor([8.0])])
    figure, axes = canvas(2.6)
    axes.plot(values, values, color=MUTED, linewidth=1, label="exact")
    axes.plot(values, rounded(values, 4), color=FINAL, label="4 bits, all values within ±1")
    axes.plot(values, rounded(with_outlier, 4)[:-1], color=WARN, label="4 bits, one value of 8 in the group")
    axes.set_xlabel("value")
    axes.set_ylabel("rounded value")
    axes.legend(loc="upper left")
    return figure


def clipping() -> Figure:
    """The error of a group over the kept part of its range has a minimum below one."""
    weights = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    kept = np.linspace(0.3, 1.0, 60)
    figure, axes = canvas(2.6)
    for bits, colour in ((2, WARN), (3, START), (4, FINAL)):
        errors = [float((rounded(weights, bits, float(part)) - weights).pow(2).mean().sqrt()) for part in kept]
        axes.plot(kept, errors, color=colour, label=f"{bits} bits")
        best = int(np.argmin(errors))
        axes.plot(kept[best], errors[best], "o", color=colour)
    axes.set_xlabel("kept part of the range, sigmoid(γ) = sigmoid(β)")
    axes.set_ylabel("root mean square error")
    axes.legend(loc="upper left")
    return figure


def starts() -> Figure:
    """The logarithmic start grows almost linearly for ordinary channels and is tamed for outliers."""
    largest = torch.logspace(-1, 3, 200)
    figure, axes = canvas(2.6)
    axes.loglog(largest, largest, color=MUTED, linewidth=1, label="S = a: all channels equally large")
    axes.loglog(largest, log_scale(largest), color=FINAL, label="LRQuant: a / log₂(2 + a)")
    axes.loglog(
        largest, smoothquant_scale(largest, torch.ones(200), 0.5), color=START, label="SmoothQuant: √(a/w), w = 1"
    )
    axes.set_xlabel("largest activation of the channel, a")
    axes.set_ylabel("scale S at the start")
    axes.legend(loc="upper left")
    return figure


def direction() -> Figure:
    """Two errors of the same length: MSE cannot tell them apart, the cosine can."""
    angle = np.linspace(0, 2 * np.pi, 200)
    truth = np.array([2.0, 1.0])
    along, across = truth / np.linalg.norm(truth), np.array([-1.0, 2.0]) / np.sqrt(5)
    figure, axes = canvas(2.8)
    axes.plot(truth[0] + 0.8 * np.cos(angle), truth[1] + 0.8 * np.sin(angle), color=GRID, linewidth=1.5)
    for end, colour, label in (
        (truth + 0.8 * along, FINAL, "wrong length: the next norm undoes it"),
        (truth + 0.8 * across, WARN, "wrong direction: nothing undoes it"),
        (truth, MUTED, "original output y"),
    ):
        arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 2, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", end, (0, 0), arrowprops=arrow)
        axes.plot([], [], color=colour, label=label)
    axes.set_xlim(-0.2, 5.6)
    axes.set_ylim(-0.2, 2.2)
    axes.set_aspect("equal")
    axes.legend(loc="lower right")
    return figure


def peers() -> Figure:
    """Perplexity lost over bits per weight, from the results of benchmarks/peers.py."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    text = "zoo:pydoc"
    full = next(line["perplexity"][text] for line in lines if line["method"] == "full precision")
    figure, axes = canvas(3.0)
    for method, (label, colour, marker) in COMPARED.items():
        points = []
        for row in ("W4A16 g128", "W3A16 g128", "W2A16 g64"):
            found = [line for line in lines if line["row"] == row and line["method"] == method]
            bits, group = found[0]["numbers"]["wbits"], found[0]["numbers"]["group_size"]
            mean = float(np.mean([line["perplexity"][text] for line in found]))
            # Beside its integers a group has a 16-bit scale and a zero point.
            points.append((bits + (16 + bits) / group, mean / full - 1))
        axes.semilogy(*zip(*points, strict=True), marker + "-", color=colour, label=label)
    axes.set_xlabel("bits per weight, scales and zero points included")
    axes.set_ylabel("perplexity above full precision")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.legend(loc="upper right")
    return figure


FIGURES: dict[str, tuple[Callable[[], Figure], str]] = {
    "outlier": (outlier, "With an outlier in the group, four bits leave only a few steps for ordinary values."),
    "clipping": (clipping, "Rounding error over the kept part of the range; the fewer bits, the more clipping pays."),
    "starts": (starts, "Where smoothing scales start, over the largest activation of a channel."),
    "peers": (peers, "Perplexity above full precision over bits per weight: lower is better."),
    "direction": (direction, "Two errors of the same length, one along the output and one across it."),
}


def svg(name: str) -> str:
    draw, description = FIGURES[name]
    with drawing():
        element = to_svg(draw(), name, description, COLOURS)
    return element.replace("<svg", '<svg font-family="system-ui, sans-serif"', 1)


def main() -> None:
    for name in sys.argv[1:] or FIGURES:
        (FOLDER / f"{name}.svg").write_text(svg(name))


if __name__ == "__main__":
    main()
