"""Successive blocks learned together: as good as one by one or better, ordinary checkpoints, runs that go on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lrquant
from lrquant import Recipe, UsageError
from lrquant.reconstruction.block_window import BlockWindow, windows_of
from lrquant.reconstruction.callbacks import Callback
from tests.tiny import SETTINGS, write_tiny

IDS = [torch.arange(start, start + 32)[None] for start in range(0, 160, 20)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"), num_hidden_layers=4)


def recipe(**changes: Any) -> Recipe:
    settings = SETTINGS | {"epochs": 1, "kernels": "eager"}
    return Recipe.preset(**{"method": "lrquant", "wbits": 3, "abits": 8, **settings, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("size", "overlap", "together", "stays"),
    [
        (1, 0, [[0], [1], [2], [3], [4]], [[0], [1], [2], [3], [4]]),
        (2, 0, [[0, 1], [2, 3], [4]], [[0, 1], [2, 3], [4]]),
        (2, 1, [[0, 1], [1, 2], [2, 3], [3, 4]], [[0], [1], [2], [3, 4]]),
        (3, 1, [[0, 1, 2], [2, 3, 4]], [[0, 1], [2, 3, 4]]),
        (9, 2, [[0, 1, 2, 3, 4]], [[0, 1, 2, 3, 4]]),
    ],
)
def test_every_block_stays_once(size: int, overlap: int, together: list[list[int]], stays: list[list[int]]) -> None:
    found = windows_of(5, size, overlap)
    assert [list(window) for window, _ in found] == together
    assert [list(kept) for _, kept in found] == stays


def test_a_window_computes_what_its_blocks_do_one_after_another(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype="float32").eval()
    blocks = list(model.model.layers[1:3])
    hidden = torch.randn(2, 8, 64)
    named = {"position_embeddings": model.model.rotary_emb(hidden, torch.arange(8)[None])}
    with torch.no_grad():
        expected = hidden
        for block in blocks:
            output = block(expected, **named)
            expected = output[0] if isinstance(output, tuple) else output
        assert torch.equal(BlockWindow(blocks)(hidden, [named, named]), expected)


@pytest.mark.parametrize("changes", [{}, {"method": "lrquant+", "rounding": "learned"}], ids=str)
def test_a_pairs_output_is_no_worse_than_one_by_one(changes: dict[str, Any], tiny: Path) -> None:
    """The loss behind every second block: what its blocks alone come to, and what they come to as a pair from there."""
    settings = {"epochs": 4, "two_branch": False, "dynamic_loss": False} | changes
    alone = lrquant.quantize(str(tiny), recipe(**settings), IDS).records
    pairs = lrquant.quantize(str(tiny), recipe(**settings, window=2), IDS).records
    assert pairs[1].initial_loss == pytest.approx(alone[1].final_loss, rel=1e-4)
    for first, second in ((0, 1), (2, 3)):
        assert pairs[first].final_loss == pairs[second].final_loss <= pairs[second].initial_loss
    assert pairs[1].final_loss < alone[1].final_loss


def test_blocks_of_an_overlap_go_on_from_what_they_were(tiny: Path) -> None:
    """The first window is the same with and without an overlap; then every window has one block that stays."""
    once = lrquant.quantize(str(tiny), recipe(window=2), IDS).records
    again = lrquant.quantize(str(tiny), recipe(window=2, window_overlap=1), IDS).records
    assert [record.index for record in again] == [0, 1, 2, 3]
    assert again[0].final_loss == once[0].final_loss
    assert again[1].final_loss != once[1].final_loss
    assert all(record.final_loss <= record.initial_loss for record in again)
    assert again[2].final_loss == again[3].final_loss


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("changes", [{}, {"method": "lrquant+", "shift": "on"}], ids=str)
def test_the_checkpoint_is_an_ordinary_one(changes: dict[str, Any], overlap: int, tiny: Path, tmp_path: Path) -> None:
    """From blocks on disk and from memory the same bytes, which answer as the model in memory does."""
    how = recipe(window=2, window_overlap=overlap, **changes)
    lrquant.quantize(str(tiny), how, IDS, save_dir=tmp_path / "out")
    kept = lrquant.quantize(str(tiny), how, IDS, save_dir=tmp_path / "kept", keep_model=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "kept")
    loaded = lrquant.load(str(tmp_path / "out"))
    with torch.no_grad():
        answers = [model(input_ids=torch.cat(IDS), use_cache=False).logits for model in (loaded, kept.model)]
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=0)
    assert Recipe.from_yaml(tmp_path / "out" / "recipe.yaml").window == 2


class Stops(Callback):
    """Interrupts a run when a block is done."""

    def __init__(self, block: int) -> None:
        self.block = block

    def block_done(self, record: Any) -> None:
        if record.index == self.block:
            raise KeyboardInterrupt


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("block", [0, 1])
def test_an_interrupted_run_ends_in_the_same_bytes(block: int, overlap: int, tiny: Path, tmp_path: Path) -> None:
    how = recipe(window=2, window_overlap=overlap)
    lrquant.quantize(str(tiny), how, IDS, save_dir=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        lrquant.quantize(str(tiny), how, IDS, save_dir=tmp_path / "out", callback=Stops(block))
    lrquant.quantize(str(tiny), how, IDS, save_dir=tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_wrong_windows_are_refused() -> None:
    with pytest.raises(UsageError, match="window_overlap 2 of window 2: the overlap must be smaller"):
        recipe(window=2, window_overlap=2)
    with pytest.raises(UsageError, match="GPTQ works on one block at a time"):
        recipe(window=2, rounding="gptq")
