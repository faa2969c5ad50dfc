"""Offline images: coloured shapes with random positions, sizes and angles over cluttered, noisy backgrounds.

`shapes` has one shape per image, in twenty `CLASSES` of shape and colour. `shapes-vqa` has one to three shapes per
image and questions with one-word answers: colour, shape, count, left or right. The seed determines an image; training
seeds and held-out seeds are disjoint ranges.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 48  # pixels
_OVERSAMPLING = 3  # drawn larger, then averaged down, so that edges are smooth
HELD_OUT_FROM = 1 << 30  # seeds below are for training and calibration

COLOURS = {
    "red": (214, 44, 44),
    "green": (46, 160, 67),
    "blue": (48, 92, 214),
    "yellow": (232, 208, 52),
    "purple": (142, 58, 182),
    "orange": (238, 134, 36),
    "white": (240, 240, 240),
    "black": (24, 24, 24),
}

Points = list[tuple[float, float]]


def _regular(corners: int, inner: float | None = None) -> Points:
    """A regular polygon on the unit circle, or a star whose inner corners lie at `inner`."""
    count = corners * (1 if inner is None else 2)
    radii = [1.0 if inner is None or index % 2 == 0 else inner for index in range(count)]
    turns = [2 * math.pi * index / count - math.pi / 2 for index in range(count)]
    return [(radius * math.cos(turn), radius * math.sin(turn)) for radius, turn in zip(radii, turns, strict=True)]


_SQUARE = [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
_CROSS_CORNER = [(-0.33, -1.0), (0.33, -1.0), (0.33, -0.33)]
_OUTLINES: dict[str, Callable[[], Points]] = {
    "circle": lambda: _regular(40),
    "square": lambda: _SQUARE,
    "triangle": lambda: _regular(3),
    "star": lambda: _regular(5, 0.42),
    "cross": lambda: [
        (x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn))
        for turn in (0, math.pi / 2, math.pi, 3 * math.pi / 2)
        for x, y in _CROSS_CORNER
    ],
    "ring": lambda: _regular(40) + [(0.55 * x, 0.55 * y) for x, y in reversed(_regular(40) + _regular(40)[:1])],
}
SHAPES = tuple(_OUTLINES)
CLASSES = tuple(f"{colour} {shape}" for colour in list(COLOURS)[:5] for shape in SHAPES[:4])
COUNTS = ("one", "two", "three")


class Placed(NamedTuple):
    """One shape in a picture; lengths in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    turn: float  # radians


class Question(NamedTuple):
    """A question about an image, and its answer."""

    question: str
    answer: str


def _draw(canvas: Image.Image, placed: Placed, colour: tuple[int, ...], zoom: int) -> None:
    cosine, sine = placed.radius * math.cos(placed.turn), placed.radius * math.sin(placed.turn)
    corners = [
        (
            zoom * (placed.x + x * cosine - y * sine),
            zoom * (placed.y + x * sine + y * cosine),
        )
        for x, y in _OUTLINES[placed.shape]()
    ]
    ImageDraw.Draw(canvas).polygon(corners, fill=colour)


def _background(random: np.random.Generator, avoided: list[str]) -> tuple[int, ...]:
    """A colour that differs visibly from every shape's."""
    while True:
        colour = random.integers(20, 236, 3)
        if all(np.abs(colour - np.array(COLOURS[name])).sum() > 150 for name in avoided):
            return tuple(int(channel) for channel in colour)


def _render(random: np.random.Generator, shapes: list[Placed], clutter: int, noise: float) -> Image.Image:
    """The picture: a background of two shades, `clutter` thin lines, the shapes, blur and noise."""
    width = SIZE * _OVERSAMPLING
    first = _background(random, [placed.colour for placed in shapes])
    canvas = Image.new("RGB", (width, width), first)
    drawing = ImageDraw.Draw(canvas)
    shade = tuple(int(np.clip(channel + random.integers(-30, 31), 0, 255)) for channel in first)
    cut = random.random(4) * width
    drawing.polygon([(0, cut[0]), (width, cut[1]), (width, width), (0, width)], fill=shade)
    for _ in range(clutter):
        line = tuple(int(channel) for channel in random.integers(20, 236, 3))
        drawing.line([tuple(point) for point in random.random((2, 2)) * width], fill=line, width=_OVERSAMPLING)
    for placed in shapes:
        tint = tuple(int(np.clip(channel + random.integers(-16, 17), 0, 255)) for channel in COLOURS[placed.colour])
        _draw(canvas, placed, tint, _OVERSAMPLING)
    small = canvas.resize((SIZE, SIZE), Image.Resampling.BOX)
    if random.random() < 0.3:
        small = small.filter(ImageFilter.GaussianBlur(float(random.uniform(0.3, 0.9))))
    pixels = np.asarray(small, dtype=np.float32) + random.normal(0, noise, (SIZE, SIZE, 3)).astype(np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def mask(placed: Placed) -> np.ndarray:
    """Where the shape lies: (SIZE, SIZE), 0 or 1."""
    canvas = Image.new("L", (SIZE, SIZE), 0)
    _draw(canvas, placed, (1,), 1)
    return np.asarray(canvas, dtype=np.float32)


def draw_picture(seed: int, harder: bool = False) -> tuple[Image.Image, Placed]:
    """A picture of one shape, and where that is; `harder`: smaller, noisier and more cluttered, to be trained on."""
    least, clutter, noise = (7, 4, 26) if harder else (9, 3, 22)
    random = np.random.default_rng((1, seed))
    colour, shape = CLASSES[random.integers(len(CLASSES))].split()
    radius = random.uniform(least, 17)
    x, y = random.uniform(radius * 0.8, SIZE - radius * 0.8, 2)
    placed = Placed(shape, colour, float(x), float(y), float(radius), float(random.uniform(-0.4, 0.4)))
    return _render(random, [placed], int(random.integers(clutter)), float(random.uniform(3, noise))), placed


def class_of(placed: Placed) -> int:
    """The shape's place in `CLASSES`."""
    return CLASSES.index(f"{placed.colour} {placed.shape}")


def draw_scene(seed: int) -> tuple[Image.Image, list[Placed]]:
    """A picture of one to three shapes of different kinds and colours, and where they are."""
    random = np.random.default_rng((2, seed))
    count = int(random.integers(1, len(COUNTS) + 1))
    kinds = random.permutation(len(SHAPES))[:count]
    colours = random.permutation(6)[:count]
    columns = random.permutation(3)[:count]  # each shape in a third of its own, so that left and right are plain
    shapes = []
    for kind, colour, column in zip(kinds, colours, columns, strict=True):
        radius = float(random.uniform(6, 8))
        x = float((column + 0.5) * SIZE / 3 + random.uniform(-1.5, 1.5))
        y = float(random.uniform(radius, SIZE - radius))
        turn = float(random.uniform(-0.4, 0.4))
        shapes.append(Placed(SHAPES[kind], list(COLOURS)[colour], x, y, radius, turn))
    return _render(random, shapes, int(random.integers(2)), float(random.uniform(2, 14))), shapes


def ask(shapes: list[Placed]) -> dict[str, list[Question]]:
    """Everything that can be asked of a picture of these shapes, by kind of question."""
    asked: dict[str, list[Question]] = {
        "count": [Question("How many shapes are there?", COUNTS[len(shapes) - 1])],
        "colour": [Question(f"What color is the {placed.shape}?", placed.colour) for placed in shapes],
        "shape": [Question(f"What shape is {placed.colour}?", placed.shape) for placed in shapes],
    }
    sides = [
        Question(f"Is the {one.shape} left or right of the {other.shape}?", "left" if one.x < other.x else "right")
        for one in shapes
        for other in shapes
        if one is not other
    ]
    return asked | {"side": sides} if sides else asked


def seeds(train: bool, count: int, start: int = 0) -> range:
    """`count` seeds of the training or the held-out range."""
    first = start if train else HELD_OUT_FROM + start
    return range(first, first + count)


def pictures(train: bool, count: int, start: int = 0) -> Iterator[tuple[Image.Image, int]]:
    """`count` pictures of one part with their classes, places in `CLASSES`."""
    for seed in seeds(train, count, start):
        image, placed = draw_picture(seed)
        yield image, class_of(placed)


def questions(train: bool, count: int, start: int = 0) -> Iterator[tuple[Image.Image, Question]]:
    """`count` pictures of one part, each with one question; every kind that fits is equally likely."""
    for seed in seeds(train, count, start):
        image, shapes = draw_scene(seed)
        random = np.random.default_rng((3, seed))
        kinds = list(ask(shapes).values())
        fitting = kinds[random.integers(len(kinds))]
        yield image, fitting[random.integers(len(fitting))]
