"""Pictures of every mode and condition become RGB or one clear line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lrquant.calibration.dialogues import dialogues
from lrquant.calibration.images import as_rgb, open_picture, pictures
from lrquant.errors import LrquantError, UsageError
from lrquant.zoo import shapes


def grey_ramp(mode: str) -> Image.Image:
    values = np.linspace(0, 1, 64).reshape(8, 8)
    if mode == "I;16":
        return Image.fromarray((values * 65535).astype(np.uint16))
    if mode == "I":
        return Image.fromarray((values * 65535).astype(np.int32))
    if mode == "F":
        return Image.fromarray(values.astype(np.float32))
    return Image.fromarray((values * 255).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("mode", ["L", "I;16", "I", "F", "RGB", "YCbCr", "RGBA", "LA"])
def test_every_mode_keeps_its_greys(mode: str) -> None:
    rgb = as_rgb(grey_ramp(mode))
    assert (rgb.mode, rgb.size) == ("RGB", (8, 8))
    expected = np.linspace(0, 255, 64).reshape(8, 8)
    assert (
        np.abs(np.asarray(rgb, dtype=float).mean(-1) - expected).max() <= 2
    )  # one for rounding, one for colour spaces


def test_one_bit_palette_and_print_colours_are_read() -> None:
    assert as_rgb(Image.new("1", (4, 4), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert as_rgb(Image.new("RGB", (4, 4), (200, 10, 10)).convert("P")).mode == "RGB"
    assert as_rgb(Image.new("CMYK", (4, 4), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_what_is_transparent_is_white() -> None:
    assert as_rgb(Image.new("RGBA", (2, 2), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("spoil", ["text", "cut", "empty"])
def test_a_damaged_picture_is_one_line_with_its_name(tmp_path: Path, spoil: str) -> None:
    path = tmp_path / "broken.png"
    shapes.draw_picture(0)[0].save(path)
    whole = path.read_bytes()
    path.write_bytes({"text": b"no picture", "cut": whole[: len(whole) // 2], "empty": b""}[spoil])
    with pytest.raises(UsageError, match=r"broken\.png") as caught:
        open_picture(path)
    assert "\n" not in str(caught.value)


def test_a_folder_is_read_with_its_classes(tmp_path: Path) -> None:
    for index, kind in enumerate(("circle", "square", "circle")):
        (tmp_path / kind).mkdir(exist_ok=True)
        shapes.draw_picture(index)[0].save(tmp_path / kind / f"{index}.png")
    found = pictures(str(tmp_path), train=False, limit=10)
    assert [picture.label for picture in found] == ["circle", "circle", "square"]
    assert found[0].load().size == (shapes.SIZE, shapes.SIZE)
    drawn = [pictures(str(tmp_path), train=True, limit=3, seed=seed) for seed in (1, 1)]
    assert [picture.label for picture in drawn[0]] == [picture.label for picture in drawn[1]]


@pytest.mark.parametrize(
    ("source", "line"),
    [("", "no image in this folder"), ("notes.txt", "folder"), ("nowhere/at/all", "neither a folder")],
)
def test_wrong_sources_of_pictures(tmp_path: Path, source: str, line: str) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(UsageError, match=line):
        pictures(str(tmp_path / source) if source != "nowhere/at/all" else source, train=True, limit=1)


def test_a_data_set_that_cannot_be_fetched_is_failed_work() -> None:
    with pytest.raises(LrquantError, match="zoo:shapes"):
        pictures("somebody/no-such-pictures", train=True, limit=1)


def rows(path: Path, *values: object) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def test_dialogues_of_a_file(tmp_path: Path) -> None:
    shapes.draw_picture(0)[0].save(tmp_path / "a.png")
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "one"}]
    source = rows(
        tmp_path / "asked.jsonl",
        {"image": "a.png", "text": "What is this?"},
        {"image": "a.png", "text": "How many?", "answer": 1},
        {"image": "a.png", "conversation": turns},
    )
    found = dialogues(source, train=False, limit=None)
    assert [dialogue.answer for dialogue in found] == [None, "1", "one"]
    assert found[2].turns == (("user", "How many?"), ("assistant", "one"))
    assert found[0].load().mode == "RGB"


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"text": "What is this?"}, "this text has no image"),
        ({"image": None, "text": "What is this?"}, "this text has no image"),
        ({"image": "b.png", "text": "What is this?"}, "b.png"),
        ({"image": "a.png"}, "needs text"),
        ({"image": "a.png", "conversation": [{"role": "assistant", "content": "one"}]}, "starts with the user's turn"),
        ({"image": "a.png", "conversation": ["How many?"]}, "role and content"),
        ("What is this?", "a row is an object"),
    ],
)
def test_a_wrong_row_is_one_line_with_its_number(tmp_path: Path, row: object, line: str) -> None:
    shapes.draw_picture(0)[0].save(tmp_path / "a.png")
    source = rows(tmp_path / "asked.jsonl", {"image": "a.png", "text": "right"}, row)
    with pytest.raises(UsageError, match=line) as caught:
        dialogues(source, train=False, limit=None)
    assert "asked.jsonl:2" in str(caught.value)


def test_the_zoo_draws_the_same_pictures_again_and_other_ones_for_another_seed() -> None:
    first, again, other = (
        [np.asarray(picture.load()) for picture in pictures("zoo:shapes", train=True, limit=3, seed=seed)]
        for seed in (0, 0, 1)
    )
    assert all((one == two).all() for one, two in zip(first, again, strict=True))
    assert not any((one == two).all() for one, two in zip(first, other, strict=True))


def test_calibration_and_evaluation_never_share_a_picture() -> None:
    assert shapes.seeds(True, 10)[-1] < shapes.HELD_OUT_FROM <= shapes.seeds(False, 10)[0]
    labels = {picture.label for picture in pictures("zoo:shapes", train=False, limit=300)}
    assert labels == set(range(len(shapes.CLASSES)))


def test_every_answer_follows_from_the_picture() -> None:
    for seed in range(30):
        _, placed = shapes.draw_scene(seed)
        asked = shapes.ask(placed)
        assert shapes.COUNTS.index(asked["count"][0].answer) + 1 == len(placed)
        assert [question.answer for question in asked["colour"]] == [each.colour for each in placed]
        for question in asked.get("side", []):
            words = question.question.rstrip("?").split()
            one, other = (next(each for each in placed if each.shape == words[place]) for place in (2, -1))
            assert question.answer == ("left" if one.x < other.x else "right")
