"""What helps a small tower learn to see in minutes: every patch says what it shows.

A class or an answer per picture is a thin signal, and a transformer without convolutions spends most of its
training before it finds out that there are edges. During training (and only then) a linear head on every
patch names the shape and the colour that it shows and outlines it; the drawing program knows all three.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from lrquant.zoo.shapes import COLOURS, SHAPES, SIZE, Placed, mask

LEAST_COVER = 0.1  # a patch shows a shape that covers at least so much of it


class PatchTeacher(nn.Module):
    """A head whose loss teaches the tokens it reads."""

    def __init__(self, hidden: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.sizes = [patch * patch, len(SHAPES) + 1, len(COLOURS) + 1]
        self.head = nn.Linear(hidden, sum(self.sizes))

    def loss(self, tokens: Tensor, drawn: list[list[Placed]]) -> Tensor:
        """`tokens` (pictures, patches, hidden) against what was `drawn` in each picture."""
        outlines, shapes, colours = (
            torch.from_numpy(np.stack(each)) for each in zip(*map(self._targets, drawn), strict=True)
        )
        outline, shape, colour = self.head(tokens).split(self.sizes, -1)
        return (
            binary_cross_entropy_with_logits(outline, outlines)
            + cross_entropy(shape.flatten(0, 1), shapes.flatten())
            + cross_entropy(colour.flatten(0, 1), colours.flatten())
        )

    def _targets(self, drawn: list[Placed]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Outlines (patches, patch²), shapes (patches,), colours (patches,); 0 is the background."""
        across = SIZE // self.patch
        masks = np.stack([mask(placed) for placed in drawn])  # (shapes, SIZE, SIZE)
        masks = masks.reshape(len(drawn), across, self.patch, across, self.patch).transpose(0, 1, 3, 2, 4)
        masks = masks.reshape(len(drawn), across * across, -1)
        cover = masks.mean(-1)
        shown = np.where(cover.max(0) >= LEAST_COVER, cover.argmax(0) + 1, 0)
        shapes = np.array([0, *(SHAPES.index(placed.shape) + 1 for placed in drawn)])
        colours = np.array([0, *(list(COLOURS).index(placed.colour) + 1 for placed in drawn)])
        return masks.max(0), shapes[shown], colours[shown]
