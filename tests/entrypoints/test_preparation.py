"""quantize and its dry run prepare a run alike: what one refuses, the other refuses in the same words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lrquant
from lrquant import Recipe, UsageError
from lrquant.entrypoints.estimate import estimate
from lrquant.entrypoints.preparation import prepare
from lrquant.runtime.execution import Machine
from tests.tiny import SETTINGS, write_tiny

HERE = Machine(torch.device("cpu"))
BAD: dict[str, dict[str, Any]] = {
    "groups": {"group_size": 48},
    "target": {"target_bits": 8.9, "abits": 16},
    "part": {"extra": ("projector",)},
    "tied head": {"extra": ("head",)},
    "window": {"seqlen": 4096},
    "tower": {"towers": ("vision",)},
    "text": {"calibration": "/no/such/text.txt"},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def refusal(work: Callable[[], Any]) -> str:
    with pytest.raises(UsageError) as refused:
        work()
    return str(refused.value)


def refused_alike(model: str, recipe: Recipe, folder: Path) -> str:
    said = refusal(lambda: estimate(model, recipe))
    assert refusal(lambda: lrquant.quantize(model, recipe, save_dir=folder / "out")) == said
    assert list(folder.iterdir()) == []
    return said


@pytest.mark.parametrize("name", BAD)
def test_a_dry_run_refuses_what_the_run_refuses(name: str, tiny: Path, tmp_path: Path) -> None:
    recipe = Recipe.preset(**{"method": "lrquant", "wbits": 4, "abits": 4, **SETTINGS, **BAD[name]})
    assert refused_alike(str(tiny), recipe, tmp_path)


def test_a_rotation_that_the_model_cannot_have_is_refused_by_both(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "gemma", "gemma2", head_dim=16, query_pre_attn_scalar=16)
    (tmp_path / "work").mkdir()
    recipe = Recipe.preset("lrquant", rotate=("stream",), **SETTINGS)
    assert "norm follows each sublayer" in refused_alike(str(model), recipe, tmp_path / "work")


def test_floats_that_no_checkpoint_of_the_model_holds_are_refused_by_both(tmp_path: Path) -> None:
    recipe = Recipe.preset("rtn", format="nvfp4", towers=("vision",), calibration="zoo:shapes-vqa", nsamples=1)
    assert "cannot load its weights packed" in refused_alike("zoo:llava", recipe, tmp_path)


@pytest.mark.parametrize("taken", ["a file", "a folder"])
def test_a_save_directory_that_is_taken_is_refused_by_both(taken: str, tiny: Path, tmp_path: Path) -> None:
    recipe, target = Recipe.preset("rtn", **SETTINGS | {"epochs": 0}), tmp_path / "out"
    if taken == "a folder":
        target.mkdir()
    (target if taken == "a file" else target / "something").write_text("of mine")
    said = refusal(lambda: estimate(str(tiny), recipe, save_dir=target))
    assert refusal(lambda: lrquant.quantize(str(tiny), recipe, save_dir=target)) == said
    assert list(tmp_path.iterdir()) == [target]


def test_a_model_that_is_not_needed_in_memory_stays_on_disk(tiny: Path) -> None:
    recipe = Recipe.preset("lrquant", wbits=4, abits=4, **SETTINGS)
    assert prepare(tiny, recipe, HERE, in_memory=False).original.is_offloaded
    assert not prepare(tiny, recipe, HERE, in_memory=True).original.is_offloaded
    tuned = prepare(tiny, recipe.changed(tuning_epochs=1), HERE, in_memory=False)
    assert not tuned.original.is_offloaded
    assert tuned.keeps_blocks
    assert tuned.original.block_source.keeps


def test_unknown_arguments_are_named(tiny: Path) -> None:
    with pytest.raises(TypeError, match="unknown argument 'devise'"):
        lrquant.quantize(str(tiny), devise="cpu")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unknown argument 'devise'"):
        lrquant.evaluate(str(tiny), [], devise="cpu")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unknown argument 'devise'"):
        lrquant.adapt(str(tiny), str(tiny), "zoo:pydoc", save_dir="out", devise="cpu")  # type: ignore[call-arg]
