"""Validate an untrusted model folder: check what its files claim against what they contain.

Weights are only read as safetensors, and a model's own code only runs on request. In addition, names in an index cannot
leave the folder. A configuration cannot request more or larger layers than the weight files have, so that building the
model cannot exhaust memory, nor kernels from the hub, which are code too. Files must be regular and of a reasonable
size.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lrquant.errors import LrquantError
from lrquant.runtime.paths import read_regular, reason

MOST_BYTES = 8 << 20  # of a configuration
MOST_INDEX = 256 << 20  # a mixture of a hundred thousand expert matrices has one of some 10 MB
MOST_TOKENIZER = 512 << 20  # of any other file that is read whole: the largest tokenizers have some 40 MB
MOST_DEPTH = 32
# Below these no claim does harm, and small models have settings beyond their sizes (Qwen2's max_window_layers).
HARMLESS_LAYERS, HARMLESS_WIDTH = 1000, 1 << 24
_LAYERS = re.compile(r"layers?$|depths?$|blocks$")
_POSITIVE = re.compile(
    r"(^|\.)(num_hidden_layers|num_layers|n_layers?|hidden_size|d_model|n_embd|vocab_size|num_attention_heads|n_heads?|"
    r"num_key_value_heads|num_kv_heads|"
    r"num_heads|head_dim)$"
)
_WIDTH = re.compile(r"size$|dim$|heads$|experts$|channels$|rank$|groups$|width$|position_embeddings$")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint in `folder`, in order.

    Raises:
        LrquantError: there are none, the index is damaged, or it names files elsewhere.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if (folder / "model.safetensors").is_file():
            return [folder / "model.safetensors"]
        if any(folder.glob("model-*-of-*.safetensors")):
            raise LrquantError(f"{folder}: has shards but no {index.name}, which lists their tensors; fetch it again")
        others = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        pickled = (
            f", and {others[0]} is a pickle, which can run code and is never opened; convert it to safetensors"
            if others
            else ""
        )
        raise LrquantError(f"{folder}: has no model.safetensors{pickled}")
    weight_map = _read_json(index, MOST_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise LrquantError(f"{index}: damaged (no weight_map of file names)")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise LrquantError(f"{index}: names {name!r}, which is not a file of this folder")
        if not (folder / name).is_file():
            raise LrquantError(f"{folder}: {name} is missing; fetch it again")
    return [folder / name for name in names]


def check_folder(folder: Path, trust_remote_code: bool = False) -> None:
    """Raise unless `folder` holds safetensors and a configuration that goes with them.

    Raises:
        LrquantError: with the file and the claim that is wrong.
    """
    config = _read_json(folder / "config.json")
    _check_files(folder)
    kernels = None if trust_remote_code else next(_kernels(config), None)
    if kernels:
        raise LrquantError(
            f"{folder}/config.json: {kernels} is code from the hub; --trust-remote-code allows it to run"
        )
    tensors = largest = 0
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as content:
                for name in content.keys():  # noqa: SIM118
                    size = 1
                    for length in content.get_slice(name).get_shape():
                        size *= length
                    tensors, largest = tensors + 1, max(largest, size)
        except (OSError, SafetensorError) as error:
            raise LrquantError(f"{file}: this weight file is damaged ({error}); fetch it again") from error
    for name, value in _numbers(config):
        key = name.rpartition(".")[2]
        if _POSITIVE.search(name) and value < 1:
            raise LrquantError(f"{folder}/config.json: {name} = {value:.4g}, which is not valid")
        if _LAYERS.search(key) and value > max(HARMLESS_LAYERS, tensors):
            raise LrquantError(f"{folder}/config.json: {name} = {value:.4g}, but there are {tensors} weights in all")
        if _WIDTH.search(key) and value > max(HARMLESS_WIDTH, largest):
            raise LrquantError(f"{folder}/config.json: {name} = {value:.4g}, but no weight is that large")


def _check_files(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".jinja", ".model", ".txt", ".yaml") or path.is_dir():
            continue
        if not path.is_file():
            raise LrquantError(f"{path}: not a regular file")
        if path.stat().st_size > MOST_TOKENIZER:
            raise LrquantError(f"{path}: larger than {MOST_TOKENIZER} bytes, the limit for this file")


def _kernels(value: Any, name: str = "") -> Iterator[str]:
    """Implementations that a configuration wants from the hub, as `name = value`."""
    if isinstance(value, dict):
        for key, item in value.items():
            if str(key).endswith("_implementation") and isinstance(item, str) and "/" in item:
                yield f"{name}{key} = {item!r}"
            yield from _kernels(item, f"{name}{key}.")
    elif isinstance(value, list):
        for item in value:
            yield from _kernels(item, name)


def _read_json(path: Path, most: int = MOST_BYTES) -> dict[str, Any]:
    try:
        values = json.loads(read_regular(path, most).decode("utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not a mapping")
        _check_depth(values, MOST_DEPTH)
    except (OSError, ValueError, RecursionError) as error:
        raise LrquantError(f"{path}: cannot be loaded ({reason(error)})") from error
    return values


def _check_depth(value: Any, left: int) -> None:
    if left == 0:
        raise ValueError(f"nested deeper than {MOST_DEPTH}")
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_depth(item, left - 1)


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number in nested mappings and lists, with the dotted name of where it stands."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value if abs(value) < 10**300 else 1e300
