"""Out of memory is one line with the knobs that help."""

from pathlib import Path
from typing import Any

import pytest
import torch

import lrquant
from lrquant import LrquantError, Recipe
from lrquant.reconstruction import rounding as solving
from lrquant.runtime.oom import advised, knobs
from tests.tiny import SETTINGS, write_tiny


def recipe(**changes: Any) -> Recipe:
    return Recipe.preset(**{"method": "lrquant", "wbits": 4, "abits": 4, **SETTINGS, **changes})


def test_knobs_come_in_the_order_that_helps_and_only_where_they_help() -> None:
    assert knobs(8, 2048, "device", dtype=torch.float32) == [
        "--batch-size 4",
        "--activations host",
        "--seqlen 1024",
        "--dtype bfloat16",
    ]
    assert knobs(1, 2, "disk", dtype=torch.bfloat16) == []


def test_a_real_allocation_that_fails_is_understood() -> None:
    said = "out of memory on this machine; try, most effective first: --a"
    with pytest.raises(LrquantError, match=said), advised(lambda: ["--a"]):
        torch.empty(1 << 60)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"), advised(list):
        raise RuntimeError("size mismatch")


def test_a_run_that_runs_out_keeps_its_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = solving.learn
    calls = []

    def learn(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*arguments, **more)

    monkeypatch.setattr(solving, "learn", learn)
    ids = [torch.arange(32)[None], torch.arange(32, 64)[None]]
    tiny = write_tiny(tmp_path / "tiny")
    with pytest.raises(LrquantError) as failed:
        lrquant.quantize(str(tiny), recipe(), calibration=ids, save_dir=tmp_path / "out", activations="host")
    assert str(failed.value) == (
        "out of memory on the device; try, most effective first: --batch-size 1, --activations disk, --seqlen 16, "
        "--dtype bfloat16; 1 finished block is kept; the same command resumes there"
    )
