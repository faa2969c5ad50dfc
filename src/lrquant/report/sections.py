"""The figures of a run's report, in order, with their titles and captions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from lrquant.report import figures
from lrquant.report.run import Run
from lrquant.report.style import drawing, to_svg


@dataclass(frozen=True)
class Picture:
    """A figure on the page and the sentence under it."""

    title: str
    svg: Markup
    caption: str


def picture(name: str, figure: Any, *, title: str, caption: str) -> Picture | None:
    """`figure` for the page; None where there is none."""
    return None if figure is None else Picture(title, Markup(to_svg(figure, name, f"{title}. {caption}")), caption)


class _Figure(NamedTuple):
    """A figure that needs nothing but the run; `draw` returns None if there is nothing to draw."""

    name: str
    draw: Callable[[Run], Any]
    title: str
    caption: str


_RESULTS = (
    _Figure("methods", figures.methods, "Methods compared", "The same model, format and samples."),
    _Figure(
        "windows",
        figures.windows,
        "Change of perplexity by window",
        "Each bar is one window of the evaluation text. Below zero, the new model finds the text more likely.",
    ),
    _Figure("pairs", figures.window_pairs, "Perplexity over the text", "Lower is better."),
)
_BLOCKS = (
    _Figure(
        "depth",
        figures.depth,
        "Error over depth",
        "Mean over tokens of |ŷ − y| / |y|, ŷ the quantized model's hidden states, y the original's.",
    ),
    _Figure(
        "steps",
        figures.steps,
        "Gain of smoothing and learning",
        "Below 100 %, the block is closer to the original than with plain rounding, on the same input.",
    ),
    _Figure(
        "cosine",
        figures.cosine,
        "Direction of the output",
        "Lower is closer. The next block's norm keeps only the direction of a hidden state.",
    ),
    _Figure(
        "losses",
        figures.losses,
        "Loss over epochs",
        "Falling lines mean that learning helps. Blocks that need attention are in the warning colour.",
    ),
)
_LAYERS = (
    _Figure(
        "sensitivity",
        figures.sensitivity,
        "Sensitivity of single layers",
        "The block's output error when only this layer's weight and input are quantized.",
    ),
)
_OUTLIERS = (
    _Figure(
        "outliers",
        figures.outliers,
        "Outlier channels before and after smoothing",
        "One point per input of a linear. At a ratio of 1 all channels would be equally large.",
    ),
)


def sections(run: Run, measurements: figures.Measurements) -> list[tuple[str, str, list[Picture]]]:
    """(title, introduction, pictures) of every section that has pictures."""
    with drawing():
        found = [
            ("Results", "", _drawn(run, _RESULTS)),
            (
                "Block by block",
                "A transformer is a stack of blocks. Each block is quantized after the blocks before it.",
                _drawn(run, _BLOCKS),
            ),
            ("Layers", "", _drawn(run, _LAYERS)),
            (
                "Inside",
                "A few blocks: the hardest, the one with the strongest outliers, and the first or a middle one.",
                [*_drawn(run, _OUTLIERS), *filter(None, _inside(run, measurements))],
            ),
        ]
    return [section for section in found if section[-1]]


def _drawn(run: Run, chosen: Sequence[_Figure]) -> list[Picture]:
    drawn = (picture(each.name, each.draw(run), title=each.title, caption=each.caption) for each in chosen)
    return [each for each in drawn if each is not None]


def _inside(run: Run, measurements: figures.Measurements) -> Iterator[Picture | None]:
    """Pictures of a few blocks' activations, scales and weights."""
    chosen = figures.chosen_blocks(run)
    for block in chosen:
        layer = figures.mapped_layer(block, measurements)
        if layer is not None:
            yield picture(
                f"map{block.index}",
                figures.activations(block, layer, measurements),
                title=f"Block {block.index}, input of {layer}",
                caption="Bright vertical lines are outlier channels: they make the quantization of all others coarser.",
            )
    yield picture(
        "scales",
        figures.scales(run, measurements),
        title="Learned scales and their initial values",
        caption="A point is a channel; on the diagonal its scale did not change. Dark: first blocks; light: last.",
    )
    for block in chosen[:2]:
        yield picture(
            f"weights{block.index}",
            figures.weights(block, measurements),
            title=f"Weights of block {block.index} and their clipped range",
            caption="Logarithmic histograms. Lines: mean ends of the clipped range. Bands: the ends of most groups.",
        )
