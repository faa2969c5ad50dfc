"""Bad input: one clear line, the right exit code, and nothing left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.run import lrquant
from tests.tiny import write_tiny

QUICK = ["--method", "rtn", "--calib", "zoo:pydoc", "--nsamples", "2", "--seqlen", "32"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def quantize(*arguments: Any) -> Callable[[Path, Path], list[Any]]:
    """A case that quantizes the tiny model with `arguments` after the quick ones (the last of an option wins)."""
    return lambda tiny, tmp: ["quantize", tiny, *QUICK, *arguments, "--save-dir", tmp / "out"]


def with_files(make: Callable[[Path, Path], list[Any]]) -> Callable[[Path, Path], list[Any]]:
    return make


def text_file(text: str) -> Callable[[Path, Path], list[Any]]:
    def case(tiny: Path, tmp: Path) -> list[Any]:
        (tmp / "text.txt").write_text(text)
        return ["quantize", tiny, *QUICK, "--calib", tmp / "text.txt", "--save-dir", tmp / "out"]

    return case


def recipe_file(text: str) -> Callable[[Path, Path], list[Any]]:
    def case(tiny: Path, tmp: Path) -> list[Any]:
        (tmp / "recipe.yaml").write_text(text)
        return ["quantize", tiny, "--recipe", tmp / "recipe.yaml", "--save-dir", tmp / "out"]

    return case


def damaged(change: Callable[[Path], None]) -> Callable[[Path, Path], list[Any]]:
    def case(tiny: Path, tmp: Path) -> list[Any]:
        shutil.copytree(tiny, tmp / "model")
        change(tmp / "model")
        return ["quantize", tmp / "model", *QUICK, "--save-dir", tmp / "out"]

    return case


def truncate(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def rewrite(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def on(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return on


def lose_a_shard(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    (model / "model.safetensors").unlink()
    save_file(
        {name: tensors[name] for name in names[::2]}, model / "model-00001-of-00002.safetensors", {"format": "pt"}
    )
    index = {name: f"model-0000{1 + position % 2}-of-00002.safetensors" for position, name in enumerate(names)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def nan_weight(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")


def occupied(tiny: Path, tmp: Path) -> list[Any]:
    (tmp / "out").mkdir()
    (tmp / "out" / "precious.txt").write_text("mine")
    return ["quantize", tiny, *QUICK, "--save-dir", tmp / "out"]


def save_dir_is_a_file(tiny: Path, tmp: Path) -> list[Any]:
    (tmp / "out").write_text("mine")
    return ["quantize", tiny, *QUICK, "--save-dir", tmp / "out"]


# name → (exit code, what the line says, the command)
CASES: dict[str, tuple[int, str, Callable[[Path, Path], list[Any]]]] = {
    "unknown model": (
        2,
        "not a local folder",
        lambda tiny, tmp: ["quantize", "no/such", *QUICK, "--save-dir", tmp / "out"],
    ),
    "model name": (
        2,
        "neither an existing folder",
        lambda tiny, tmp: ["quantize", "a/b/c!", *QUICK, "--save-dir", tmp / "out"],
    ),
    "unknown zoo model": (
        2,
        "zoo:llama",
        lambda tiny, tmp: ["quantize", "zoo:camel", *QUICK, "--save-dir", tmp / "out"],
    ),
    "empty folder": (2, "no config.json", lambda tiny, tmp: ["quantize", tmp, *QUICK, "--save-dir", tmp / "out"]),
    "unknown dataset": (2, "neither a data set", quantize("--calib", "wikitext3")),
    "unknown zoo text": (2, "zoo:pydoc, zoo:pycode", quantize("--calib", "zoo:pydocs")),
    "unreachable dataset": (1, "cannot be fetched", quantize("--calib", "wikitext2")),
    "unknown method": (2, "unknown method 'gptq'", quantize("--method", "gptq")),
    "one bit": (2, "wbits = 1", quantize("--wbits", 1)),
    "seventeen bits": (2, "wbits = 17", quantize("--wbits", 17)),
    "no bits": (2, "abits = 0", quantize("--abits", 0)),
    "nothing to do": (2, "nothing would be quantized", quantize("--wbits", 16, "--abits", 16)),
    "group size": (2, "group size 48 does not divide the 64", quantize("--group-size", 48)),
    "negative group": (2, "group_size", quantize("--group-size", -1)),
    "negative epochs": (2, "epochs", quantize("--epochs", -1)),
    "no samples": (2, "nsamples", quantize("--nsamples", 0)),
    "learning rate": (2, "let_lr", quantize("--let-lr", 0)),
    "too long": (2, "128 positions", quantize("--seqlen", 4096)),
    "too little text": (2, "tokens are too few for 2 samples of 32", text_file("A few words.")),
    "empty text": (2, "there is no text in it", text_file("  \n ")),
    "device": (2, "device 'cuda:7'", quantize("--device", "cuda:7")),
    "device name": (2, "device 'gpu'", quantize("--device", "gpu")),
    "json folder": (2, "its folder does not exist", quantize("--json", "/no/such/folder/x.json")),
    "occupied": (2, "is not empty", occupied),
    "a file": (2, "is a file", save_dir_is_a_file),
    "not writable": (
        2,
        "cannot be written",
        lambda tiny, tmp: ["quantize", tiny, *QUICK, "--save-dir", "/proc/lrquant/out"],
    ),
    "truncated shard": (1, "damaged", damaged(truncate)),
    "missing shard": (1, "model-00002-of-00002.safetensors", damaged(lose_a_shard)),
    "missing weight": (1, "lacks 1 weights", damaged(rewrite(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")))),
    "nan weight": (1, "model.layers.0.mlp.up_proj.weight holds NaN", damaged(rewrite(nan_weight))),
    "config": (1, "cannot be loaded", damaged(lambda model: (model / "config.json").write_text("{") and None)),
    "model type": (
        1,
        "cannot be loaded",
        damaged(lambda m: (m / "config.json").write_text('{"model_type": "camel"}') and None),
    ),
    "misspelt key": (2, "unknown recipe key 'wbit'", recipe_file("method: rtn\nwbit: 4\n")),
    "recipe method": (2, "unknown method 'lrquant++'", recipe_file("method: lrquant++\n")),
    "recipe type": (2, "epochs", recipe_file("epochs: many\n")),
    "recipe is a list": (2, "a recipe is a mapping", recipe_file("- wbits\n")),
    "recipe is not YAML": (2, "not valid YAML", recipe_file("wbits: [4\n")),
    "recipe with code": (2, "not valid YAML", recipe_file("wbits: !!python/object/apply:os.getcwd []\n")),
    "no recipe": (
        2,
        "cannot read",
        lambda tiny, tmp: ["quantize", tiny, "--recipe", tmp / "no.yaml", "--save-dir", tmp / "out"],
    ),
    "recipe and method": (
        2,
        "not both",
        lambda tiny, tmp: ["quantize", tiny, "--recipe", tmp / "no.yaml", "--method", "rtn", "--save-dir", tmp / "out"],
    ),
    "no save dir": (2, "--save-dir", lambda tiny, tmp: ["quantize", tiny]),
    "misspelt option": (2, "No such option", quantize("--wbit", 4)),
    "statistics": (2, "not a file of channel statistics", quantize("--statistics", "/etc/hostname")),
    "eval nothing": (2, "nothing to measure: name a text", lambda tiny, tmp: ["eval", tiny]),
    "eval unknown": (2, "neither a data set", lambda tiny, tmp: ["eval", tiny, "--ppl", "nothing"]),
    "eval short": (2, "less than one window", lambda tiny, tmp: ["eval", tiny, "--ppl", tiny / "short.txt"]),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, tiny: Path, tmp_path: Path) -> None:
    (tiny / "short.txt").write_text("Short.")
    code, says, make = CASES[name]
    arguments = make(tiny, tmp_path)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    done = lrquant(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    if "Usage:" not in done.stderr:  # typer's own errors come in a box
        assert len([line for line in done.stderr.splitlines() if "Error:" in line]) == 1
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
