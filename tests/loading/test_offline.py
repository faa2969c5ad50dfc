"""Where the hub does not answer, the libraries look into their cache and give up at once."""

from typing import Any

import datasets.config
import pytest
from huggingface_hub import constants

from lrquant.loading import offline as hub


class NoAnswer:
    def head(self, *_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")


def test_an_unreachable_hub_means_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", NoAnswer)
    with hub.cache_if_unreachable():
        assert constants.HF_HUB_OFFLINE
        assert datasets.config.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


def test_a_hub_that_answers_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answers:
        def head(self, *_: Any, **__: Any) -> str:
            return "ok"

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", Answers)
    with hub.cache_if_unreachable():
        assert not constants.HF_HUB_OFFLINE
