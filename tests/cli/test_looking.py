"""What a person sees at the terminal besides the results: info, doctor, quiet and logged output, scalars, upload."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.run import ENVIRONMENT, lrquant
from tests.tiny import write_tiny

QUICK = ["--calib", "zoo:pydoc", "--nsamples", 2, "--seqlen", 32, "--epochs", 1, "--batch-size", 2, "--no-report"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def w4a4(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("made") / "w4a4"
    assert lrquant("quantize", tiny, "--save-dir", target, *QUICK).returncode == 0
    return target


def test_info_tells_what_quantize_told(w4a4: Path, tiny: Path, tmp_path: Path) -> None:
    done = lrquant("info", w4a4, "--json", tmp_path / "facts.json")
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["format"] == "W4A4"
    assert facts["method"] == "lrquant"
    assert facts["quantized_linears"] == 14  # seven in each of two blocks
    # per block: q, o 64×64, k, v 32×64, three 128×64 in the MLP
    assert facts["parameters"] == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    assert facts["left_alone"] == ["lm_head"]
    assert facts["floating_point"]["embedding"] == "model.embed_tokens"
    blocks = 2 * (facts["parameters"] // 2 + 2 * 64)
    assert facts["quantized_share"] == pytest.approx(facts["parameters"] / (blocks + 64 + 4096 * 64))  # head tied
    assert facts["weights"] == "int4, asymmetric, per output channel"
    assert facts["runs"]["vLLM on NVIDIA GPUs"] == "no: activations below 8 bits must be symmetric"
    assert "4 bits per token and head" in done.stdout
    again = lrquant("quantize", tiny, "--save-dir", tmp_path / "w8", *QUICK, "--wbits", 8, "--abits", 8, "--symmetric",
                    "--json", tmp_path / "w8.json")  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert lrquant("info", tmp_path / "w8", "--json", tmp_path / "facts8.json").returncode == 0
    facts, told = (json.loads((tmp_path / name).read_text()) for name in ("facts8.json", "w8.json"))
    assert facts["bits_per_weight"] == pytest.approx(told["bits_per_weight"])
    assert facts["bytes"] == told["checkpoint_bytes"]
    assert facts["runs"]["vLLM on CPUs"] == "yes: oneDNN int8 products"


def test_info_needs_no_torch(w4a4: Path) -> None:
    program = (
        f"import sys; from lrquant.cli.info import describe; from pathlib import Path; describe(Path({str(w4a4)!r}));"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("command", ["info", "report"])
def test_what_is_no_result_is_one_line(command: str, tiny: Path, tmp_path: Path) -> None:
    for path in (tiny, tmp_path, tmp_path / "missing"):
        done = lrquant(command, path)
        assert done.returncode == 2
        assert done.stderr.startswith("Error: ")
        assert str(path) in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_damaged_weight_file_is_one_line(w4a4: Path, tmp_path: Path) -> None:
    for path in w4a4.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes((w4a4 / "model.safetensors").read_bytes()[:100])
    done = lrquant("info", tmp_path)
    assert done.returncode == 1
    assert "model.safetensors: damaged" in done.stderr


def test_compare_needs_two(w4a4: Path) -> None:
    done = lrquant("compare", w4a4)
    assert done.returncode == 2
    assert "at least two" in done.stderr


def test_doctor_knows_this_machine(tmp_path: Path) -> None:
    import torch

    done = lrquant("doctor", "--json", tmp_path / "machine.json")
    assert done.returncode == 0, done.stderr
    machine = json.loads((tmp_path / "machine.json").read_text())
    assert torch.__version__ in machine["machine"]["torch"]
    assert machine["devices"][0]["device"] == "cpu"
    assert machine["required"]["torch"] == torch.__version__
    assert {"wandb", "tensorboard"} <= machine["optional"].keys()


def test_doctor_says_which_package_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from lrquant.cli import doctor

    monkeypatch.setattr(doctor, "requires", lambda name: ["rich>=9999", "no-such-package-here>=1"])
    done = lrquant("doctor")
    assert done.returncode == 1
    assert "rich" in done.stderr
    assert "no-such-package-here is missing" in done.stderr


def test_quiet_leaves_the_results(tiny: Path, tmp_path: Path) -> None:
    done = lrquant("quantize", tiny, "--save-dir", tmp_path / "out", *QUICK, "--quiet")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "bits per quantized weight" in done.stdout
    assert "Note" not in done.stdout


def test_the_log_has_everything_also_when_quiet(tiny: Path, tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    lrquant("quantize", tiny, "--save-dir", tmp_path / "out", *QUICK, "--quiet", "--log-file", log)
    text = log.read_text()
    assert "block 1 (2/2)" in text
    assert "bits per quantized weight" in text
    assert "\x1b[" not in text
    lrquant("quantize", tiny, "--save-dir", tmp_path / "out", *QUICK, "--log-file", log)  # it is there already
    assert log.read_text().startswith(text)
    assert "Error: " in log.read_text().splitlines()[-1]
    done = lrquant("info", tmp_path / "out", "--log-file", tmp_path / "no" / "folder.log")
    assert done.returncode == 2
    assert "cannot be written" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX's")
@pytest.mark.parametrize("colour", [True, False])
def test_a_terminal_sees_a_bar_and_colour_unless_told_otherwise(colour: bool, tiny: Path, tmp_path: Path) -> None:
    import pty

    environment = {key: value for key, value in (os.environ | ENVIRONMENT).items() if key != "NO_COLOR"}
    environment |= {"TERM": "xterm-256color"} | ({} if colour else {"NO_COLOR": "1"})
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "lrquant", "quantize", tiny, "--save-dir", tmp_path / "out", *QUICK]
    process = subprocess.Popen(list(map(str, command)), stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    assert process.wait() == 0, shown
    os.close(master)
    assert b"left" in shown  # the bar's time left
    assert b"loss" in shown
    coloured = re.search(rb"\x1b\[(?:\d+;)*(?:3[0-7]|38|9[0-7])[;m]", shown)  # bold and italic may stay
    assert (coloured is not None) is colour
    assert b"bits per quantized weight" in shown


def test_scalars_go_to_tensorboard(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = lrquant("quantize", tiny, "--save-dir", tmp_path / "out", *QUICK, "--epochs", 2, "--log-to", "tensorboard",
                   "--json", tmp_path / "figures.json", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(tmp_path / "runs" / "out")).Reload()
    blocks = json.loads((tmp_path / "figures.json").read_text())["blocks"]
    assert [e.value for e in events.Scalars("loss/block 1")] == pytest.approx(blocks[1]["epoch_losses"])
    assert [e.value for e in events.Scalars("blocks/final_loss")] == pytest.approx([b["final_loss"] for b in blocks])


def test_scalars_go_to_weights_and_biases(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    done = lrquant("quantize", tiny, "--save-dir", tmp_path / "out", *QUICK, "--log-to", "wandb", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_tracker_that_is_not_installed_is_one_line(tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not there
    done = lrquant("quantize", tiny, "--save-dir", tmp_path / "out", *QUICK, "--log-to", "wandb")
    assert done.returncode == 2
    assert "pip install 'lrquant[wandb]'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_upload_hands_the_whole_folder_to_the_hub(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself is out of reach here: its client's two calls are recorded."""
    import huggingface_hub

    calls: dict[str, dict[str, Any]] = {}

    class Client:
        def create_repo(self, repo_id: str, **how: Any) -> Any:
            calls["create"] = {"repo_id": repo_id, **how}
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, **how: Any) -> str:
            calls["upload"] = how | {"files": sorted(path.name for path in Path(how["folder_path"]).iterdir())}
            return f"https://huggingface.co/{how['repo_id']}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Client)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    options = ["--push-to-hub", "someone/tiny-w4a4", "--private"]
    done = lrquant("quantize", tiny, "--save-dir", tmp_path / "out", *QUICK, *options)
    assert done.returncode == 0, done.stderr
    assert calls["create"] == {"repo_id": "someone/tiny-w4a4", "private": True, "exist_ok": True}
    assert {"README.md", "config.json", "model.safetensors", "recipe.yaml"} <= set(calls["upload"]["files"])
    assert "https://huggingface.co/someone/tiny-w4a4" in done.stdout


@pytest.mark.parametrize(
    ("name", "offline", "token", "message"),
    [("a b", False, "x", "not a repository"), ("a/b", True, "x", "HF_HUB_OFFLINE"), ("a/b", False, None, "log")],
)
def test_an_upload_that_cannot_begin_is_said_before_any_work(
    name: str, offline: bool, token: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    done = lrquant("quantize", "zoo:llama", "--save-dir", tmp_path / "out", "--push-to-hub", name)
    assert done.returncode == 2
    assert message in done.stderr
    assert "block" not in done.stderr


def test_the_card_is_what_the_hub_reads(tiny: Path, w4a4: Path) -> None:
    from huggingface_hub import ModelCard

    from lrquant.export.model_card import _on_the_hub

    data = ModelCard.load(w4a4 / "README.md").data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert {"lrquant", "compressed-tensors", "quantized", "w4a4", "4-bit"} == set(data.tags or [])
    assert data.base_model is None  # a local folder; the hub would refuse it
    assert yaml.safe_load(data.to_yaml())["quantization"] == "W4A4"
    assert _on_the_hub("Qwen/Qwen3-0.6B")
    assert not _on_the_hub(str(tiny))
    assert not _on_the_hub("zoo:llama")


def test_the_shell_completes_names() -> None:
    def completions(line: str) -> str:
        environment = os.environ | {"_LRQUANT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": "3"}
        program = "import sys; sys.argv = ['lrquant']; from lrquant.cli.main import app; app(prog_name='lrquant')"
        return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True).stdout

    offered = set(completions("lrquant quantize --method lr").split())
    assert {"lrquant", "lrquant+"} <= offered
    assert all(name.startswith("lr") for name in offered)
