"""What `lrquant quantize MODEL` chooses by itself."""

from typing import Any

import pytest
from transformers import AutoConfig

from lrquant.entrypoints import defaults
from lrquant.entrypoints.defaults import chosen_calibration, chosen_format, decides
from lrquant.errors import LrquantError
from lrquant.recipe import Recipe


def llama(**changes: int) -> Any:
    widths = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "head_dim": 64}
    return AutoConfig.for_model("llama", **widths | changes)


@pytest.mark.parametrize(
    ("changes", "group"),
    [
        ({"hidden_size": 512, "num_attention_heads": 8}, 128),
        ({}, 64),
        ({"intermediate_size": 1504}, 32),
        ({"intermediate_size": 1500}, None),
        ({"hidden_size": 512, "num_attention_heads": 8, "head_dim": 56}, 64),  # the output projection has 448 inputs
    ],
)
def test_groups_divide_every_width(changes: dict[str, int], group: int | None) -> None:
    values, words = chosen_format(llama(**changes), "cuda")
    assert Recipe.preset(**values).group_size == group
    assert (f"groups of {group}" if group else "one scale per row") in words


def test_learning_needs_an_accelerator() -> None:
    assert "method" not in chosen_format(llama(), "cuda")[0]
    values, words = chosen_format(llama(max_position_embeddings=128), "cpu")
    assert Recipe.preset(**values).method == "rtn"
    assert values["seqlen"] == 128
    assert "no accelerator" in words


def test_the_default_set_is_taken_where_it_can_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "read_text", lambda *_, **__: ["text"])
    assert chosen_calibration(llama())[0] == "wikitext2"


def test_an_offline_set_is_taken_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> list[str]:
        raise LrquantError("data set 'wikitext2' cannot be fetched")

    monkeypatch.setattr(defaults, "read_text", unreachable)
    source, words = chosen_calibration(llama())
    assert source == "zoo:pydoc"
    assert "unreachable" in words
    assert chosen_calibration(AutoConfig.for_model("vit"))[0] == "zoo:shapes"


def test_samples_and_the_machine_leave_the_format_open() -> None:
    assert not decides({"nsamples": 4, "calibration": "a.txt", "dtype": "float32"})
    assert decides({"wbits": 3})
    assert decides({"method": "rtn"})
    assert decides({"epochs": 1})
