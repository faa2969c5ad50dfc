"""Windows begin with the BOS token where the tokenizer adds one, in calibration and evaluation alike."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import lrquant
from lrquant.calibration.samples import samples_of
from lrquant.entrypoints.adapt import adaptation_samples
from lrquant.recipe import Recipe
from tests.tiny import SETTINGS, write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer adds BOS to a text."""
    folder = write_tiny(tmp_path_factory.mktemp("bos") / "tiny")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, 0)]
    )
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"][0] == 0
    return folder


def first_tokens(folder: Path, **changes: Any) -> list[int]:
    recipe = Recipe.preset("rtn", **SETTINGS | changes)
    samples = samples_of("text", AutoTokenizer.from_pretrained(folder), recipe, window=lambda seqlen: seqlen or 32)
    assert all(sample["input_ids"].shape == (1, 32) for sample in samples)
    return [int(sample["input_ids"][0, 0]) for sample in samples]


def test_calibration_begins_with_bos_unless_it_is_off(tiny: Path) -> None:
    assert first_tokens(tiny) == [0, 0, 0, 0]
    assert 0 not in first_tokens(tiny, bos="off")[1:]


def test_evaluation_begins_with_bos_and_says_so(tiny: Path) -> None:
    auto, off = (
        lrquant.evaluate(str(tiny), ["zoo:pydoc"], 32, limit_windows=4, bos=bos)["zoo:pydoc"] for bos in ("auto", "off")
    )
    assert (auto.bos, off.bos) == (True, False)
    assert auto.window_losses != off.window_losses


def test_adaptation_sees_the_windows_that_evaluation_does(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert all(row[0, 0] == 0 for row in adaptation_samples(tokenizer, "zoo:pydoc", 32, most=3, bos="auto"))


def test_published_settings_leave_it_out_and_the_recipe_keeps_it(tmp_path: Path) -> None:
    assert Recipe.preset("lrquant").bos == "auto"
    published = Recipe.preset("lrquant", paper_exact=True)
    assert published.bos == "off"
    published.to_yaml(tmp_path / "recipe.yaml")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml").bos == "off"
    (tmp_path / "plain.yaml").write_text("bos: off\n")
    assert Recipe.from_yaml(tmp_path / "plain.yaml").bos == "off"
