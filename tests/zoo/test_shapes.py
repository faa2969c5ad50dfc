"""Drawn pictures follow from their seeds; outlier channels change what is inside a model and not what it says."""

import numpy as np
import pytest
import torch

from lrquant.architectures import family_of
from lrquant.loading.pretrained import load_model
from lrquant.transforms import NormToLinears
from lrquant.zoo import shapes
from lrquant.zoo.scripts.outliers import grow_outliers
from lrquant.zoo.tasks.shapes_vqa import dataset, images


def test_a_picture_follows_from_its_seed_and_parts_never_meet() -> None:
    first, again, other = (shapes.draw_picture(seed)[0] for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not set(shapes.seeds(True, 10**6)) & set(shapes.seeds(False, 10**6))
    assert {label for _, label in shapes.pictures(True, 400)} == set(range(len(shapes.CLASSES)))


def test_questions_have_one_right_answer() -> None:
    for seed in range(200):
        _, placed = shapes.draw_scene(seed)
        by_shape = {each.shape: each for each in placed}
        assert len(by_shape) == len({each.colour for each in placed}) == len(placed)
        asked = shapes.ask(placed)
        assert [shapes.COUNTS.index(one.answer) + 1 for one in asked["count"]] == [len(placed)]
        for one in asked["colour"]:
            assert by_shape[one.question.rstrip("?").split()[-1]].colour == one.answer
        for one in asked.get("side", []):
            words = one.question.rstrip("?").split()
            left = by_shape[words[2]].x < by_shape[words[-1]].x
            assert one.answer == ("left" if left else "right")


def test_the_task_asks_held_out_questions() -> None:
    rows = dataset()["test"]
    image, asked = next(shapes.questions(False, 1))
    assert (rows[0]["question"], rows[0]["answer"]) == tuple(asked)
    assert np.array_equal(images(rows[0])[0], image)


@pytest.mark.parametrize("name", ["zoo:vit", "zoo:llama"])
def test_outlier_channels_change_no_answer(name: str) -> None:
    """Powers of two scale exactly, so that even float32 rounding hardly differs."""
    model, grown = (load_model(name, torch.float32) for _ in range(2))
    grow_outliers(grown, factor=8, value_factor=16, share=0.05)
    generator = torch.Generator().manual_seed(0)
    if name == "zoo:vit":
        inputs = {"pixel_values": torch.randn(2, 3, shapes.SIZE, shapes.SIZE, generator=generator)}
    else:
        inputs = {"input_ids": torch.randint(0, 4096, (2, 24), generator=generator)}
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits, grown(**inputs).logits, atol=1e-4)
    (stage,) = family_of(model).stages(model)
    norms = [equivalence.norm for equivalence in stage.equivalences if isinstance(equivalence, NormToLinears)]
    for path in (f"{stage.path}.0.{norm}.weight" for norm in norms):
        factor = grown.get_parameter(path) / model.get_parameter(path)
        assert sorted(set(factor.tolist())) == [1.0, 8.0]
        assert (factor == 8).sum() == int(0.05 * factor.numel())
