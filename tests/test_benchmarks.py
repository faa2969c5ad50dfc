"""The benchmark scripts run from end to end and print their tables, at sizes that take seconds."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.tiny import write_tiny

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny(tmp_path_factory.mktemp("tiny")))


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop(name, None)
    return importlib.import_module(name)


def rows(printed: str) -> list[list[str]]:
    """The cells of a markdown table's lines below its head."""
    lines = [line.strip("|").split("|") for line in printed.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines[2:]]


def test_block_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    main = script("block_step", monkeypatch).main
    for method in ("lrquant", "lrquant-max"):
        main("32,64,4,2", 16, 2, method, 4, 4, None, 2, 2, "cpu", "plain;eager, float32;eager, bfloat16")
        found = rows(capsys.readouterr().out)
        assert [row[0] for row in found] == ["plain", "eager, float32", "eager, bfloat16"]
        assert found[0][2] == "1.0"
        assert all(float(row[1]) > 0 and float(row[5]) >= 0 and float(row[6]) > 0 for row in found)


def test_the_plain_block_computes_what_the_engine_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise the comparison would compare different things."""
    block_step = script("block_step", monkeypatch)
    losses = []
    measured = block_step.seconds_of

    def watched(step: object, *arguments: object) -> float:
        taken = measured(step, *arguments)
        if step.__defaults__ is not None:  # type: ignore[attr-defined]
            forward, start, _ = step.__defaults__  # type: ignore[attr-defined]
            output, targets = forward(start, range(2))
            losses.append(block_step.plain_loss(output, targets, True)[0].item())
        return taken

    monkeypatch.setattr(block_step, "seconds_of", watched)
    block_step.main("32,64,4,2", 16, 2, "lrquant", 4, 4, None, 1, 0, "cpu", "plain;eager, float32")
    plain, ours = losses
    assert ours == pytest.approx(plain, rel=1e-4)


def test_methods_and_ablation(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"nsamples": 2, "seqlen": 32, "epochs": 1, "batch_size": 2, "seeds": 1, "windows": 1}
    script("methods", monkeypatch).main(
        model=tiny, methods="rtn lrquant:loss=mse", outliers=2.0, json_file=tmp_path / "methods.json", **settings
    )
    found = rows(capsys.readouterr().out)
    assert [row[0] for row in found] == ["full precision", "rtn", "lrquant:loss=mse"]
    assert len(json.loads((tmp_path / "methods.json").read_text())["rtn"]["seconds"]) == 1

    ablation = script("ablation", monkeypatch)
    for _ in range(2):  # the second time everything is in the file
        ablation.main(model=tiny, formats="W3A16", rows="0,4", json_file=tmp_path / "ablation.json", **settings)
    printed = capsys.readouterr()
    assert [row[0] for row in rows(printed.out)][1:3] == ["LRQuant", "+ rotation"]
    assert printed.err.count("seed 0") == 2
    ablation.main(model=tiny, table="all", formats="W4A4", rows="0,1,4", concentrate=True, outliers=2.0, **settings)
    found = rows(capsys.readouterr().out)
    assert [row[0] for row in found][1:] == ["rounding to nearest", "… behind orthogonal rotation", "everything"]


def test_adaptation(tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script("adaptation", monkeypatch).main(
        model=tiny, formats="W4A4", blocks="last", starts="neutral", nsamples=2, seqlen=32, epochs=1, windows=2, seeds=1
    )
    assert [row[0] for row in rows(capsys.readouterr().out)] == [
        "full precision",
        "W4A4, calibrated on zoo:pycode",
        "… blocks adapted: last, neutral start",
        "W4A4, calibrated on zoo:pydoc's train part",
    ]
