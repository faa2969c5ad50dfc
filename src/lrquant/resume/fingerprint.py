"""The fingerprint of a run: a table of everything that it depends on. A run is only resumed with the same fingerprint.

A model on disk is identified by its configuration and its weight files. Up to 8 GiB they are read completely. For
larger models, every header (names, shapes, types, offsets) and pieces spread evenly over each file are read, so that
this takes seconds for 140 GB, and a fine-tuned model is distinguished from its base.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrquant.recipe import Recipe

WHOLE = 8 << 30  # bytes of weight files that are read to the last
PIECE, PIECES = 1 << 20, 64  # of each file beyond that


def identity_of(
    recipe: Recipe,
    model: str,
    samples: Sequence[Mapping[str, Any]],
    dtypes: Sequence[torch.dtype],
    given: Mapping[str, Any],
) -> dict[str, str]:
    """`model` is `folder_digest` or `module_digest`; `given` has other inputs, such as statistics."""
    values = {f"recipe.{name}": json.dumps(value) for name, value in recipe.model_dump(mode="json").items()}
    values |= {"model": model, "calibration samples": digest_of(samples)}
    values["precision"] = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return values | {name: digest_of(value) if value is not None else "none" for name, value in given.items()}


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """A description of the first difference; None: there is none."""
    for name in [*before, *now]:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name.startswith("recipe."):
            return f"{name.removeprefix('recipe.')} was {old} and is now {new}"
        return f"the {name} changed" + (f" from {old} to {new}" if name == "precision" else "")
    return None


def digest_of(value: Any) -> str:
    """SHA-256 of tensors and plain values in lists, mappings and dataclasses."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        if value.numel():
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for key in sorted(value):
            digest.update(f"{key}=".encode())
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}]".encode())
        for item in value:
            _feed(digest, item)
    elif hasattr(value, "__dataclass_fields__"):
        _feed(digest, vars(value))
    else:
        digest.update(f"{type(value).__name__}:{value};".encode())


def module_digest(model: nn.Module) -> str:
    """Of a model in memory: every parameter and buffer."""
    return digest_of(dict(model.state_dict()))


def folder_digest(folder: Path, files: Sequence[Path]) -> str:
    """Of a model on disk: its configuration, and its weight files."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    sizes = [file.stat().st_size for file in files]
    for file, size in zip(files, sizes, strict=True):
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as content:
            if sum(sizes) <= WHOLE:
                while piece := content.read(PIECE):
                    digest.update(piece)
                continue
            header = int.from_bytes(content.read(8), "little")
            digest.update(content.read(min(header, size)))
            for index in range(PIECES):
                content.seek(index * max(0, size - PIECE) // (PIECES - 1))
                digest.update(content.read(PIECE))
    return digest.hexdigest()
