"""`--for`, and what a run says of the programs that serve its result."""

import json
from pathlib import Path

import pytest
import torch

from lrquant.recipe import Recipe
from tests.cli.run import lrquant
from tests.tiny import write_tiny

QUICK = ["--method", "rtn", "--calib", "zoo:pydoc", "--nsamples", 2, "--seqlen", 32, "--no-report"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "model")


def test_the_result_runs_where_it_is_meant_to(tiny: Path, tmp_path: Path) -> None:
    done = lrquant("quantize", tiny, "--save-dir", tmp_path / "w4", *QUICK, "--for", "llama.cpp")
    assert done.returncode == 0, done.stderr
    recipe = Recipe.from_yaml(tmp_path / "w4" / "recipe.yaml")
    assert (recipe.wbits, recipe.abits, recipe.group_size, recipe.symmetric) == (4, 16, 32, True)
    assert "llama-server" in done.stdout
    assert "vllm serve" in done.stdout
    card = (tmp_path / "w4" / "README.md").read_text()
    assert "| llama.cpp" in card
    assert "yes: Q4_0, after lrquant export --to gguf" in card
    shown = lrquant("info", tmp_path / "w4", "--json", tmp_path / "facts.json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads((tmp_path / "facts.json").read_text())["runs"]["SGLang on NVIDIA GPUs"] == "yes: Marlin"


def test_what_nothing_serves_is_said_before_the_work(tiny: Path) -> None:
    done = lrquant("quantize", tiny, "--dry-run", *QUICK, "--wbits", 6, "--abits", 6)
    assert done.returncode == 0, done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    assert "W6A6: no program runs this format" in said
    assert "Programs run --wbits 6 --abits 8 --for vllm." in said


def test_what_cannot_run_there_is_refused(tiny: Path, tmp_path: Path) -> None:
    done = lrquant("quantize", tiny, "--save-dir", tmp_path / "no", *QUICK, "--wbits", 6, "--abits", 6, "--for", "vllm")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "W6A6: does not run in vLLM" in done.stderr
    assert not (tmp_path / "no").exists()


def test_a_float32_model_gets_scales_that_llama_cpp_holds(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = write_tiny(tmp_path / "model", dtype=torch.float32)
    done = lrquant("quantize", model, "--save-dir", tmp_path / "w4", *QUICK, "--for", "llama.cpp")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "w4" / "config.json").read_text())["dtype"] == "bfloat16"
    done = lrquant("export", tmp_path / "w4", "--to", "gguf", tmp_path / "w4.gguf")
    assert done.returncode == 0, done.stderr
    plain = lrquant("quantize", model, "--save-dir", tmp_path / "plain", *QUICK, "--wbits", 4, "--abits", 16)
    assert plain.returncode == 0, plain.stderr
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["dtype"] == "float32"
