"""The papers' command lines, pasted from the repository's root, on a small local model folder."""

import json
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

import lrquant
from tests.tiny import write_tiny

ROOT = Path(__file__).parents[2]
# As published, then what makes them small and offline.
SMALL = "--calib_dataset calib.txt --nsamples 2 --seqlen 32 --limit 2 --eval_ppl_data test.txt"
TRAIN = "--epochs 1"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and two texts in it, as the current one."""
    text = (ROOT / "LICENSE").read_text()
    (tmp_path / "calib.txt").write_text(text)
    (tmp_path / "test.txt").write_text(text[-4000:])
    write_tiny(tmp_path / "MODEL")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def paste(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run `python FILE …` in this process; its exit code."""
    _, file, *arguments = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [file, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / file), run_name="__main__")
    return int(ended.value.code or 0)


def results(name: str = "NAME") -> dict:
    return json.loads(Path("log", name, "results.json").read_text())


def test_statistics_first_then_the_weight_activation_command(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "--calib_dataset calib.txt --num-samples 2 --seq-len 32"
    assert paste(f"python generate_act_scale_shift.py --model MODEL {small}", monkeypatch) == 0
    for kind in ("scales", "shifts"):
        with safe_open(f"act_{kind}/MODEL.safetensors", "pt") as file:
            names = set(file.keys())
        assert {name.partition(":")[2] for name in names} == {"absmax" if kind == "scales" else "midpoint"}
        assert len(names) == 2 * 7  # blocks × linears

    published = "--output_dir ./log/NAME --save_dir ./output/NAME --eval_ppl --wbits 4 --abits 4 --lwc --let"
    assert paste(f"python main.py --model MODEL --epochs 20 {published} {SMALL} {TRAIN}", monkeypatch) == 0
    assert "statistics of act_scales" in " ".join(capsys.readouterr().out.split())
    found = results()
    assert found["perplexity"]["test.txt"] > 1
    assert found["saved_to"] == "output/NAME"
    recipe = found["recipe"]
    assert (recipe["let_lr"], recipe["lwc_lr"], recipe["seed"], recipe["schedule"]) == (5e-3, 1e-2, 2, "constant")
    assert lrquant.Recipe.from_yaml("log/NAME/recipe.yaml") == lrquant.Recipe.parse(recipe)
    assert "block 1" in Path("log/NAME/log.txt").read_text()
    assert (
        lrquant.evaluate("output/NAME", ["test.txt"], 32, limit_windows=2)["test.txt"].value
        == found["perplexity"]["test.txt"]
    )

    # Saved parameters, evaluated again: the same model to the last bit.
    resume = "--epochs 0 --resume ./log/NAME/lrquant_parameters.safetensors --eval_ppl --output_dir log/again"
    assert paste(f"python main.py --model MODEL --wbits 4 --abits 4 --lwc --let {resume} {SMALL}", monkeypatch) == 0
    assert results("again")["perplexity"] == found["perplexity"]
    # Of another shape they are refused, by block and name.
    wrong = f"python main.py --model MODEL --wbits 4 --abits 4 --lwc --group_size 32 {resume} {SMALL}"
    assert paste(wrong, monkeypatch) == 2
    assert "do not fit this model and recipe" in " ".join(capsys.readouterr().err.split())


def test_adaptation(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "python main.py --model MODEL --output_dir ./log/NAME --eval_ppl --wbits 4 --abits 4 --lwc --let --tta"
    assert paste(f"{command} {SMALL} {TRAIN}", monkeypatch) == 0
    found = results()
    assert found["adapted_perplexity"].keys() == found["perplexity"].keys() == {"test.txt"}
    assert found["adapted_perplexity"] != found["perplexity"]
    assert found["saved_to"] is None  # nothing was asked to be kept


def test_tasks_that_cannot_be_fetched_are_named_and_the_rest_is_kept(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    tasks = "piqa,arc_easy,arc_challenge,boolq,hellaswag,winogrande"
    command = f"python main.py --model MODEL --output_dir ./log/NAME --wbits 4 --abits 4 --lwc --let --tasks {tasks}"
    assert paste(f"{command},zoo:cloze {SMALL} {TRAIN}", monkeypatch) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for task in tasks.split(","):
        assert f"task '{task}' could not be run" in shown
    assert "zoo_cloze" in shown
    assert set(results()["tasks"]) == {"zoo_cloze"}


@pytest.mark.parametrize("plus", ["", "--lr_plus", "--lr-plus"])
def test_weight_only(plus: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "python main.py --model MODEL --output_dir ./log/NAME --eval_ppl --wbits 4 --abits 16 --lwc"
    assert paste(f"{command} {plus} {SMALL} {TRAIN}", monkeypatch) == 0
    recipe = results()["recipe"]
    assert recipe["rotation_vectors"] == bool(plus)
    assert not recipe["let"]
    with safe_open("log/NAME/lrquant_parameters.safetensors", "pt") as file:
        assert any(name.endswith(".rotation") for name in file.keys()) == bool(plus)  # noqa: SIM118


def test_the_weight_only_example_with_four_bit_activations_is_taken_literally(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The published example's heading says W4A16, its flags say --abits 4."""
    command = "python main.py --model MODEL --output_dir ./log/NAME --eval_ppl --wbits 4 --abits 4 --lwc"
    assert paste(f"{command} {SMALL} {TRAIN}", monkeypatch) == 0
    assert results()["format"] == "W4A4"
    assert "weight-only is --abits 16" in capsys.readouterr().out


def test_plus_with_weights_and_activations_as_a_process_without_data(root: Path) -> None:
    """In a process of its own; `--eval_ppl` names what it cannot reach and goes on."""
    command = (
        f"{sys.executable} {ROOT / 'main.py'} --model MODEL --wbits 4 --abits 4 --lwc --let --lr_plus --eval_ppl "
        "--calib-dataset calib.txt --nsamples 2 --seqlen 32 --epochs 1"
    )
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    for name in ("wikitext2", "ptb", "c4"):
        assert f"no perplexity on {name}: data set '{name}' cannot be fetched" in shown
    found = json.loads(Path("log/results.json").read_text())
    assert found["perplexity"] == {}
    assert found["recipe"]["two_branch"]
    assert found["recipe"]["seqlen"] == 32


def test_nothing_to_learn_is_wrong_use(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert paste("python main.py --model MODEL --wbits 4 --abits 4", monkeypatch) == 2


def test_several_texts_follow_one_option(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "other.txt").write_text((root / "test.txt").read_text())
    (root / "third.txt").write_text((root / "test.txt").read_text())
    command = "python main.py --model MODEL --wbits 4 --abits 16 --lwc --epochs 0 --output_dir log/NAME"
    assert paste(f"{command} {SMALL} other.txt third.txt", monkeypatch) == 0
    assert set(results()["perplexity"]) == {"test.txt", "other.txt", "third.txt"}
    assert paste(f"{command} other.txt", monkeypatch) == 2
    assert "'other.txt' is not an option" in " ".join(capsys.readouterr().err.split())
