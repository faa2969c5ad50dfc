"""A text is tokenized once, and never taken for another."""

from typing import Any

import pytest
import torch

from lrquant.calibration import token_cache
from lrquant.calibration.text import tokenize
from lrquant.loading.pretrained import load_tokenizer


class Counted:
    """A tokenizer that counts its calls."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.calls = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        return self._tokenizer(*arguments, **options)


def test_the_second_time_costs_nothing_and_gives_the_same() -> None:
    token_cache._ids.cache_clear()
    tokenizer = Counted(load_tokenizer("zoo:llama"))
    first = tokenize(tokenizer, "a text")
    first[0] += 1  # what a caller does to its copy changes no other
    assert torch.equal(tokenize(tokenizer, "a text"), tokenizer("a text", return_tensors="pt")["input_ids"][0])
    assert tokenizer.calls == 2
    tokenize(tokenizer, "another text")
    assert tokenizer.calls == 3


def test_another_tokenizer_is_another() -> None:
    plain, changed = load_tokenizer("zoo:llama"), load_tokenizer("zoo:llama")
    changed.add_tokens(["text"])
    assert tokenize(plain, "a text").tolist() != tokenize(changed, "a text").tolist()
    assert tokenize(plain, "a text", special=False).tolist() == plain("a text", add_special_tokens=False)["input_ids"]


def test_few_texts_are_kept() -> None:
    token_cache._ids.cache_clear()
    tokenizer = load_tokenizer("zoo:llama")
    for number in range(token_cache.MOST_TEXTS + 3):
        tokenize(tokenizer, f"text {number}")
    assert token_cache._ids.cache_info().currsize == token_cache.MOST_TEXTS


def test_a_long_text_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    token_cache._ids.cache_clear()
    monkeypatch.setattr(token_cache, "MOST_CHARACTERS", 3)
    tokenize(load_tokenizer("zoo:llama"), "long")
    assert token_cache._ids.cache_info().currsize == 0
