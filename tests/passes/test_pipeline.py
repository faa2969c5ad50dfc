"""The passes that a recipe stands for, what they are told of, and one of your own as docs/passes.md adds it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lrquant
from lrquant import Recipe
from lrquant.passes import pipeline as passes
from lrquant.passes.pipeline import PASSES, needs_blocks, needs_model, pipeline
from lrquant.reconstruction.callbacks import EVENTS, Callback, Callbacks
from tests.tiny import SETTINGS, write_tiny

PAGE = Path(__file__).parent.parent.parent / "docs" / "passes.md"
IDS = [torch.arange(start, start + 32)[None] for start in range(0, 80, 20)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def recipe(**changes: Any) -> Recipe:
    return Recipe.preset(**{"method": "lrquant", "wbits": 4, "abits": 4, **SETTINGS, **changes})


def names(**changes: Any) -> list[str]:
    return [each.name for each in pipeline(recipe(**changes))]


def test_a_recipe_stands_for_passes_in_a_fixed_order() -> None:
    assert names() == ["blocks"]
    everything = {"rotate": ("values",), "target_bits": 3.5, "tuning_epochs": 1, "extra": ("head",)}
    assert names(**everything) == [each.name for each in PASSES]
    assert names(target_bits=3.5, layer_bits={"a": 3}) == ["blocks"]  # the bits are known already


def test_passes_say_what_they_need() -> None:
    assert not needs_model(recipe())
    assert not needs_blocks(recipe(extra=("head",)))
    assert needs_model(recipe(extra=("head",)))
    assert needs_blocks(recipe(tuning_epochs=1))


class Listening(Callback):
    """Writes down the names of events."""

    def __init__(self) -> None:
        self.heard: list[str] = []


def _listen(event: str) -> Any:
    return lambda self, *facts: self.heard.append(event if event[:4] != "pass" else f"{event} {facts[0]}")


for _event in EVENTS:
    setattr(Listening, _event, _listen(_event))


def test_events_come_in_the_order_that_is_documented(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
    listening = Listening()
    lrquant.quantize(model, recipe(rotate=("values",), tuning_epochs=1), IDS, callback=Callbacks(listening))
    block = ["block_begins", "epoch_done", "block_decided", "block_ends", "block_done"]
    assert listening.heard == [
        "pass_begins rotation",
        "pass_ends rotation",
        "pass_begins blocks",
        "started",
        *block,
        *block,
        "pass_ends blocks",
        "pass_begins end-to-end tuning",
        "tuned",
        "tuned",
        "pass_ends end-to-end tuning",
    ]


def test_every_event_is_on_the_page() -> None:
    assert all(f"`{event}(" in PAGE.read_text() for event in EVENTS)


def test_the_pages_pass_and_callback_work(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Both as they stand on the page, on a model whose blocks are on disk."""
    written: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
        assert code.count("\n") < 60
        exec(code, written)
    monkeypatch.setattr(passes, "PASSES", (written["MAGNITUDES"], *PASSES))
    losses = written["Losses"]()
    quantized = lrquant.quantize(str(tiny), recipe(), IDS, save_dir=tmp_path / "out", callback=losses)
    printed = capsys.readouterr().out
    assert "model.layers.0: " in printed
    assert "model.layers.1: " in printed
    assert losses.found == [(record.initial_loss, record.final_loss) for record in quantized.records]
