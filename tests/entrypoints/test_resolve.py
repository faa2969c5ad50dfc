"""A recipe is resolved once: what is left to the model and the machine is decided, and saved beside the result."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lrquant
from lrquant import Recipe, UsageError
from lrquant.entrypoints import resolve as resolving
from lrquant.entrypoints.preparation import prepare
from lrquant.entrypoints.resolve import resolve, resolve_kernels
from lrquant.loading.original import Original
from lrquant.runtime.execution import Machine
from tests.tiny import SETTINGS, write_tiny

HERE = Machine(torch.device("cpu"))
IDS = [torch.arange(start, start + 32)[None] for start in range(0, 80, 20)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def recipe(**changes: Any) -> Recipe:
    return Recipe.preset(**{"method": "lrquant", "wbits": 4, "abits": 4, **SETTINGS, **changes})


def test_nothing_is_left_to_be_chosen_and_resolving_again_changes_nothing(tiny: Path) -> None:
    asked = recipe(seqlen=None, rotate=("auto",))
    prepared = prepare(tiny, asked, HERE)
    assert prepared.asked == asked
    assert prepared.recipe.seqlen == 128  # the model's most
    assert "auto" not in {prepared.recipe.products, prepared.recipe.kernels, *prepared.recipe.rotate}
    again = resolve(prepared.recipe, prepared.original, HERE, samples=prepared.samples, given=None)
    assert again == prepared.recipe


def test_the_resolved_recipe_is_the_one_that_is_saved(tiny: Path, tmp_path: Path) -> None:
    resolved = prepare(tiny, recipe(rotate=("auto",)), HERE).recipe
    quantized = lrquant.quantize(str(tiny), recipe(rotate=("auto",)), save_dir=tmp_path / "out")
    assert quantized.recipe == resolved == Recipe.from_yaml(tmp_path / "out" / "recipe.yaml")


def test_the_number_of_threads_is_kept_and_taken(tiny: Path) -> None:
    """Sums over other parts are rounded differently, so a recipe brings its number along."""
    before = torch.get_num_threads()
    try:
        assert prepare(tiny, recipe(), HERE).recipe.threads == before
        assert prepare(tiny, recipe(threads=before + 1), HERE).recipe.threads == before + 1
        assert torch.get_num_threads() == before + 1
        many = (os.cpu_count() or 1) + 1
        assert f"asks for {many} CPU threads" in prepare(tiny, recipe(threads=many), HERE).notes[0]
    finally:
        torch.set_num_threads(before)


def test_token_ids_from_memory_are_counted_and_named(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
    resolved = prepare(model, recipe(), HERE, calibration=IDS).recipe
    assert (resolved.nsamples, resolved.calibration) == (4, "token ids given in memory")


def test_a_pytorch_that_loses_roundings_is_not_asked_to_compile(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
    asked = recipe()
    original, samples = Original.in_memory(model, asked), [{"input_ids": IDS[0], "use_cache": False}]
    monkeypatch.setattr(resolving, "WORTH_COMPILING", 0.0)
    monkeypatch.setattr(resolving, "COMPILES_EXACTLY", True)
    assert resolve_kernels(asked, original, HERE, samples=samples) == "compiled"
    monkeypatch.setattr(resolving, "COMPILES_EXACTLY", False)
    assert resolve_kernels(asked, original, HERE, samples=samples) == "eager"
    with pytest.raises(UsageError, match=r"^kernels = compiled: PyTorch .* 2\.13"):
        resolve_kernels(asked.changed(kernels="compiled"), original, HERE, samples=samples)
