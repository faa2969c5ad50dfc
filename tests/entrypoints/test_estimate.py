"""A dry run against the truth."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lrquant
from lrquant import Recipe
from lrquant.entrypoints.estimate import estimate
from lrquant.export.shards import tensor_bytes
from lrquant.loading.offload import OffloadedBlocks
from lrquant.reconstruction.callbacks import Callback
from lrquant.resume.run_directory import run_folder
from tests.children import start, wait
from tests.cli.run import lrquant_process
from tests.tiny import write_tiny


def text_file(folder: Path) -> str:
    """A text that is soon read."""
    (folder / "text.txt").write_text(" ".join(map(str, range(3000))))
    return str(folder / "text.txt")


def test_the_bundled_model_within_thirty_percent(tmp_path: Path) -> None:
    command = ["quantize", "zoo:llama", "--save-dir", tmp_path / "out", "--calib", text_file(tmp_path), "--nsamples", 8]
    command += ["--seqlen", 256, "--batch-size", 4, "--epochs", 2, "--no-report"]
    before = sorted(tmp_path.iterdir())
    dry = lrquant_process(*command, "--dry-run", "--json", tmp_path / "dry.json")
    assert dry.returncode == 0, dry.stderr
    assert "6, with 4.1 M parameters" in dry.stdout
    assert sorted(path for path in tmp_path.iterdir() if path.name != "dry.json") == before
    real = lrquant_process(*command, "--json", tmp_path / "real.json")
    assert real.returncode == 0, real.stderr
    guessed, true = (json.loads((tmp_path / name).read_text()) for name in ("dry.json", "real.json"))
    for name in ("checkpoint_bytes", "peak_memory_bytes"):
        assert guessed[name] == pytest.approx(true[name], rel=0.3), name
    assert guessed["seconds"] > 2 * 2 * 6 * guessed["step_seconds"] > 0  # 2 epochs of 2 steps, 6 blocks


@pytest.mark.parametrize("method", ["lrquant", "lrquant+"])
def test_time_within_thirty_percent_on_the_bundled_model(method: str, tmp_path: Path) -> None:
    """In seconds of this process, not of the clock: other work on the machine is no concern of the estimate."""
    recipe = Recipe.preset(method, wbits=4, abits=4, calibration=text_file(tmp_path), nsamples=12, seqlen=128)
    recipe = recipe.changed(batch_size=4, epochs=5, kernels="eager", early_stop=0.0)

    def child(work: Callable[[], float], name: str) -> float:
        def measured() -> None:
            time.perf_counter = time.process_time  # ours, in this child alone
            (tmp_path / name).write_text(str(work()))

        assert wait(start(measured)) == 0
        return float((tmp_path / name).read_text())

    def guess() -> float:
        return estimate("zoo:llama", recipe).seconds

    def truth() -> float:
        return lrquant.quantize("zoo:llama", recipe, save_dir=tmp_path / "out").seconds

    assert child(guess, "guess") == pytest.approx(child(truth, "truth"), rel=0.3)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "lrquant"},
        {"method": "lrquant+", "wbits": 2, "abits": 16, "group_size": 32},
        {"method": "lrquant-max", "wbits": 3, "abits": 8},
        {"method": "rtn", "wbits": 8, "abits": 8},
    ],
    ids=lambda changes: changes["method"],
)
def test_bytes_are_what_is_read_and_written(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = write_tiny(tmp_path / "tiny", num_hidden_layers=5, tie_word_embeddings=False)
    epochs = {} if changes["method"] == "rtn" else {"epochs": 1}
    text = text_file(tmp_path)
    recipe = Recipe.preset(**changes, calibration=text, nsamples=4, seqlen=32, batch_size=2, tuning_epochs=0, **epochs)
    guessed = estimate(str(tiny), recipe)
    read: list[int] = []
    real = OffloadedBlocks._stored

    def counted(self: OffloadedBlocks, name: str) -> torch.Tensor:
        tensor = real(self, name)
        read.append(tensor.numel() * 2)  # bfloat16 on disk
        return tensor

    kept: list[int] = []

    class Looks(Callback):
        def block_done(self, record: Any) -> None:
            kept[:] = [sum(path.stat().st_size for path in run_folder(tmp_path / "out").glob("*.safetensors"))]

    monkeypatch.setattr(OffloadedBlocks, "_stored", counted)
    lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "out", callback=Looks())
    assert guessed.blocks == 5
    assert guessed.read_bytes == pytest.approx(sum(read), rel=0.05)  # the files have headers
    assert guessed.checkpoint_bytes == pytest.approx(tensor_bytes(tmp_path / "out"), rel=0.01)
    assert guessed.work_bytes == pytest.approx(kept[0], rel=0.3)  # headers again: these blocks are small
    assert guessed.activation_bytes == 4 * 32 * 64 * 4 * (2 + recipe.two_branch)
