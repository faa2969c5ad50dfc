"""What makes the inputs of test_bad_input.py: damaged models, odd files, folders that are taken."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.cli.run import lrquant

QUICK = ["--method", "rtn", "--calib", "zoo:pydoc", "--nsamples", "2", "--seqlen", "32"]

# (the tiny model, a folder of its own) → the arguments of a command
Case = Callable[[Path, Path], list[Any]]


def quantize(*arguments: Any) -> Case:
    """A case that quantizes the tiny model with `arguments` after the quick ones (the last of an option wins)."""
    return lambda tiny, tmp: ["quantize", tiny, *QUICK, *arguments, "--save-dir", tmp / "out"]


def calibration(make: Callable[[Path], object], name: str = "text.txt") -> Case:
    """A case whose calibration set is at the path that `make` is given, and fills."""

    def case(tiny: Path, tmp: Path) -> list[Any]:
        make(tmp / name)
        return ["quantize", tiny, *QUICK, "--calib", tmp / name, "--save-dir", tmp / "out"]

    return case


def text_file(text: str) -> Case:
    return calibration(lambda path: path.write_text(text))


def calibration_file(name: str, content: bytes) -> Case:
    return calibration(lambda path: path.write_bytes(content), name)


def recipe_file(text: str) -> Case:
    def case(tiny: Path, tmp: Path) -> list[Any]:
        (tmp / "recipe.yaml").write_text(text)
        return ["quantize", tiny, "--recipe", tmp / "recipe.yaml", "--save-dir", tmp / "out"]

    return case


def damaged(change: Callable[[Path], None]) -> Case:
    def case(tiny: Path, tmp: Path) -> list[Any]:
        shutil.copytree(tiny, tmp / "model")
        change(tmp / "model")
        return ["quantize", tmp / "model", *QUICK, "--save-dir", tmp / "out"]

    return case


def truncate(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def damaged_result(change: Callable[[Path], None]) -> Case:
    """A quantized model that something happened to afterwards."""

    def case(tiny: Path, tmp: Path) -> list[Any]:
        lrquant("quantize", tiny, *QUICK, "--save-dir", tmp / "quantized", "--no-report")
        change(tmp / "quantized")
        return ["eval", tmp / "quantized", "--ppl", "zoo:pydoc", "--seqlen", 32, "--limit-windows", 1]

    return case


def flip(model: Path) -> None:
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1000] ^= 1
    (model / "model.safetensors").write_bytes(weights)


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


class Bomb:
    """Goes off when it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path("exploded").touch, ())  # in the working directory, where the test would find it


def only_a_pickle(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def disguised_pickle(model: Path) -> None:
    (model / "model.safetensors").write_bytes(pickle.dumps(Bomb()))


def index(weight_map: Any) -> Callable[[Path], None]:
    """The weights in one shard under an index of our own."""

    def on(model: Path) -> None:
        (model / "model.safetensors").rename(model / "shard.safetensors")
        (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return on


def config(**changes: Any) -> Callable[[Path], None]:
    def on(model: Path) -> None:
        values = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(values | changes))

    return on


def raw(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda model: (model / name).write_bytes(content) and None


def without_tokenizer(model: Path) -> None:
    for path in model.glob("*token*"):
        path.unlink()


def huge_tokenizer(model: Path) -> None:
    os.truncate(model / "tokenizer.json", 3 << 30)  # a sparse file


def a_fifo(name: str) -> Callable[[Path], None]:
    def on(model: Path) -> None:
        (model / name).unlink()
        os.mkfifo(model / name)

    return on


def shards_without_index(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")


def unfinished(content: str | None) -> Case:
    """A run's folder with this in place of its description; None: a FIFO."""

    def case(tiny: Path, tmp: Path) -> list[Any]:
        (tmp / ".out.lrquant").mkdir()
        (tmp / ".out.lrquant" / "lock").write_text("lrquant 1\n")
        (tmp / ".out.lrquant" / "00000.json").write_text("{}")  # a block: the folder is worth keeping
        if content is None:
            os.mkfifo(tmp / ".out.lrquant" / "run.json")
        else:
            (tmp / ".out.lrquant" / "run.json").write_text(content)
        return ["quantize", tiny, *QUICK, "--save-dir", tmp / "out"]

    return case


def below_a_file(tiny: Path, tmp: Path) -> list[Any]:
    (tmp / "file").touch()
    return ["quantize", tiny, *QUICK, "--save-dir", tmp / "file" / "out"]


def occupied(tiny: Path, tmp: Path) -> list[Any]:
    (tmp / "out").mkdir()
    (tmp / "out" / "precious.txt").write_text("mine")
    return ["quantize", tiny, *QUICK, "--save-dir", tmp / "out"]


def save_dir_is_a_file(tiny: Path, tmp: Path) -> list[Any]:
    (tmp / "out").write_text("mine")
    return ["quantize", tiny, *QUICK, "--save-dir", tmp / "out"]


def command(*words: Any) -> Case:
    """A case of another command: TINY stands for the tiny model, TMP and TMP/NAME for places in the test's folder."""

    def case(tiny: Path, tmp: Path) -> list[Any]:
        known = {"TINY": tiny, "TMP": tmp}
        return [known.get(word) or (tmp / word[4:] if str(word).startswith("TMP/") else word) for word in words]

    return case


def a_strangers_run_folder(tiny: Path, tmp: Path) -> list[Any]:
    (tmp / ".out.lrquant").mkdir()
    (tmp / ".out.lrquant" / "mine.txt").write_text("mine")
    return ["quantize", tiny, *QUICK, "--restart", "--save-dir", tmp / "out"]


def a_run_folder_that_is_a_link(tiny: Path, tmp: Path) -> list[Any]:
    (tmp / "other").mkdir()
    (tmp / "other" / "mine.txt").write_text("mine")
    (tmp / ".out.lrquant").symlink_to(tmp / "other")
    return ["quantize", tiny, *QUICK, "--restart", "--save-dir", tmp / "out"]


def in_place_of_the_weights(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def on(model: Path) -> None:
        (model / "model.safetensors").unlink()
        make(model / "model.safetensors")

    return on


# name → (exit code, what the line says, the command)
