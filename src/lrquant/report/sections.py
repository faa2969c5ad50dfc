"""The pictures of a run's report: which there are, in which order, and what is said of each."""

from collections.abc import Callable, Iterator
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


class _Drawn(NamedTuple):
    """A figure before it is drawn; `figure` answers None where there is nothing to draw."""

    name: str
    figure: Callable[[], Any]
    title: str
    caption: str


def picture(name: str, figure: Any, title: str, caption: str) -> Picture | None:
    """`figure` for the page; None where there is none."""
    return None if figure is None else Picture(title, Markup(to_svg(figure, name, f"{title}. {caption}")), caption)


def sections(run: Run, measurements: figures.Measurements) -> list[tuple[str, str, list[Picture]]]:
    """(title, introduction, pictures) of every section that has pictures."""
    found = []
    with drawing():
        for title, introduction, pictures in _SECTIONS:
            drawn = [
                picture(each.name, each.figure(), each.title, each.caption) for each in pictures(run, measurements)
            ]
            if any(drawn):
                found.append((title, introduction, [each for each in drawn if each]))
    return found


def _results(run: Run, measurements: figures.Measurements) -> Iterator[_Drawn]:
    yield _Drawn("methods", lambda: figures.methods(run), "Methods compared", "The same model, format and samples.")
    yield _Drawn(
        "windows",
        lambda: figures.windows(run),
        "Change of perplexity by window",
        "Each bar is one window of the evaluation text. Below zero, the new model finds the text more likely.",
    )
    yield _Drawn("pairs", lambda: figures.window_pairs(run), "Perplexity over the text", "Lower is better.")


def _block_by_block(run: Run, measurements: figures.Measurements) -> Iterator[_Drawn]:
    yield _Drawn(
        "depth",
        lambda: figures.depth(run),
        "Error over depth",
        "Mean over tokens of |ŷ − y| / |y|, ŷ the quantized model's hidden states, y the original's.",
    )
    yield _Drawn(
        "steps",
        lambda: figures.steps(run),
        "Gain of smoothing and learning",
        "Below 100 %, the block is closer to the original than with plain rounding, on the same input.",
    )
    yield _Drawn(
        "cosine",
        lambda: figures.cosine(run),
        "Direction of the output",
        "Lower is closer. The next block's norm keeps only the direction of a hidden state.",
    )
    yield _Drawn(
        "losses",
        lambda: figures.losses(run),
        "Loss over epochs",
        "Falling lines mean that learning helps. Blocks that need attention are in the warning colour.",
    )


def _layers(run: Run, measurements: figures.Measurements) -> Iterator[_Drawn]:
    yield _Drawn(
        "sensitivity",
        lambda: figures.sensitivity(run),
        "Sensitivity of single layers",
        "The block's output error when only this layer's weight and input are quantized.",
    )


def _inside(run: Run, measurements: figures.Measurements) -> Iterator[_Drawn]:
    yield _Drawn(
        "outliers",
        lambda: figures.outliers(run),
        "Outlier channels before and after smoothing",
        "One point per input of a linear. At a ratio of 1 all channels would be equally large.",
    )
    chosen = figures.chosen_blocks(run)
    for block in chosen:
        layer = figures.mapped_layer(block, measurements)
        if layer is not None:
            yield _Drawn(
                f"map{block.index}",
                lambda block=block, layer=layer: figures.activations(block, layer, measurements),  # type: ignore[misc]
                f"Block {block.index}, input of {layer}",
                "Bright vertical lines are outlier channels: they make the quantization of all others coarser.",
            )
    yield _Drawn(
        "scales",
        lambda: figures.scales(run, measurements),
        "Learned scales and their initial values",
        "A point is a channel; on the diagonal its scale did not change. Dark: first blocks; light: last.",
    )
    for block in chosen[:2]:
        yield _Drawn(
            f"weights{block.index}",
            lambda block=block: figures.weights(block, measurements),  # type: ignore[misc]
            f"Weights of block {block.index} and their clipped range",
            "Logarithmic histograms. Lines: mean ends of the clipped range. Bands: the ends of most groups.",
        )


_SECTIONS: tuple[tuple[str, str, Callable[[Run, figures.Measurements], Iterator[_Drawn]]], ...] = (
    ("Results", "", _results),
    (
        "Block by block",
        "A transformer is a stack of blocks. Each block is quantized after the blocks before it.",
        _block_by_block,
    ),
    ("Layers", "", _layers),
    (
        "Inside",
        "A few blocks: the hardest, the one with the strongest outliers, and the first or a middle one.",
        _inside,
    ),
)
