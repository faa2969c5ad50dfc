"""What scripts rely on: options, exit codes, the JSON, and quick help."""

import json
import os
from pathlib import Path

import pytest

from tests.cli.run import lrquant, lrquant_process
from tests.tiny import write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def test_quantize_needs_only_a_model(tiny: Path, tmp_path: Path) -> None:
    done = lrquant("quantize", tiny, "--no-report", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Chosen: 4-bit weights with groups of 64" in done.stdout + done.stderr
    assert "zoo:pydoc because the hub is unreachable" in done.stdout + done.stderr
    assert (tmp_path / f"{tiny.name}-w4a16-g64" / "model.safetensors").is_file()


def test_windows_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrquant.cli.main.sys.platform", "win32")
    done = lrquant("doctor")
    assert done.returncode == 2
    assert done.stderr.strip() == "Error: lrquant does not run on Windows; use WSL (the Windows Subsystem for Linux)"


def test_quantize_then_eval(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "held-out.txt").write_text("Every statement ends somewhere. " * 200)
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    done = lrquant(
        "quantize",
        tiny,
        "--method",
        "omniquant",
        "--wbits",
        4,
        "--abits",
        4,
        "--group-size",
        32,
        "--calib",
        "zoo:pydoc",
        "--nsamples",
        4,
        "--seqlen",
        32,
        "--epochs",
        1,
        "--batch-size",
        2,
        "--lwc",
        "--no-let",
        "--let-lr",
        1e-3,
        "--lwc-lr",
        1e-2,
        "--shift",
        "off",
        "--no-quantize-attention",
        "--seed",
        1,
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--save-dir",
        out,
        "--eval-ppl",
        "zoo:pydoc",
        "--eval-ppl",
        tmp_path / "held-out.txt",
        "--limit-windows",
        2,
        "--save-statistics",
        tmp_path / "statistics.safetensors",
        "--json",
        figures,
    )
    assert done.returncode == 0, done.stderr
    values = json.loads(figures.read_text())
    assert set(values["perplexity"]) == {"zoo:pydoc", "held-out.txt"}
    for name in ("seconds", "peak_memory_bytes", "checkpoint_bytes", "bits_per_weight", "ratio_to_bf16"):
        assert values[name] > 0
    assert values["recipe"]["method"] == "omniquant"
    assert values["recipe"]["let"] is False
    assert len(values["blocks"]) == 2
    # The screen shows the same figures.
    assert f"{values['perplexity']['zoo:pydoc']:.3f}" in done.stdout
    assert f"{values['bits_per_weight']:.3f}" in done.stdout

    done = lrquant(
        "eval", out, "--ppl", "zoo:pydoc", "--seqlen", 32, "--limit-windows", 2, "--json", tmp_path / "eval.json"
    )
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "eval.json").read_text())
    assert again["perplexity"]["zoo:pydoc"] == values["perplexity"]["zoo:pydoc"]

    done = lrquant(
        "quantize",
        tiny,
        "--recipe",
        out / "recipe.yaml",
        "--seed",
        2,
        "--save-dir",
        tmp_path / "again",
        "--statistics",
        tmp_path / "statistics.safetensors",
        "--json",
        tmp_path / "again.json",
    )
    assert done.returncode == 0, done.stderr
    recipe = json.loads((tmp_path / "again.json").read_text())["recipe"]
    assert recipe == values["recipe"] | {"seed": 2}


def test_progress_goes_to_standard_error_line_by_line(tiny: Path, tmp_path: Path) -> None:
    done = lrquant(
        "quantize",
        tiny,
        "--method",
        "rtn",
        "--calib",
        "zoo:pydoc",
        "--nsamples",
        2,
        "--seqlen",
        32,
        "--save-dir",
        tmp_path / "out",
    )
    assert "block 1 (2/2)" in done.stderr
    assert "it/s" not in done.stderr
    assert "block" not in done.stdout.split("saved to")[0]


def test_help_is_instant() -> None:
    """No heavy library is imported for it. Processor time, because a busy machine says nothing about the program."""
    times = []
    for _ in range(3):
        before = os.times()
        assert lrquant_process("--help").returncode == 0
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(times) < 1  # 0.35 s, where importing torch alone takes two


def test_help_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    heavy = ("torch", "transformers", "datasets", "matplotlib", "jinja2", "pydantic")
    program = f"import sys, lrquant.cli.main; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"
