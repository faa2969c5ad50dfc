"""Checkpoints measured in the programs that are installed."""

import json
from pathlib import Path

import pytest

from lrquant.entrypoints.bench import bench
from lrquant.entrypoints.speed import installed
from lrquant.errors import UsageError
from tests.cli.run import lrquant
from tests.tiny import write_tiny


def test_every_program_that_is_here_is_measured(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model")
    done = lrquant("bench", model, "--prompt", 8, "--new", 4, "--threads", 1, "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "figures.json").read_text())["measured"]
    assert [each["program"] for each in measured] == installed()
    for each in measured:
        speed = each["speed"]
        assert speed, each["failed"]
        assert min(speed.values()) > 0
        assert speed["peak_bytes"] > speed["file_bytes"]


def test_a_program_that_fails_is_said(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    (found,) = bench([str(folder)], ["transformers"], prompt=4, new=1, threads=1)
    assert found.speed is None
    assert "damaged" in (found.failed or "")


def test_bad_wishes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no program 'onnx': there are transformers"):
        bench(["zoo:llama"], ["onnx"])
    with pytest.raises(UsageError, match=r"no config\.json"):
        bench([str(tmp_path)], ["transformers"])
