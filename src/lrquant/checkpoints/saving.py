"""Writing a checkpoint: whole or not at all, beside its recipe and a model card."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrquant._registration import BASE_MODEL_TYPE, OWN_METHOD, OWN_MODEL_TYPE
from lrquant.checkpoints.card import model_card
from lrquant.checkpoints.packing import checkpoint_tensors, quantization_config
from lrquant.errors import LrquantError, UsageError
from lrquant.modality import auto_model
from lrquant.recipe import Recipe
from lrquant.reconstruction import Reconstruction

RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class Sizes:
    """Bytes on disk against bf16, and what a quantized weight costs with its scales and zero points."""

    checkpoint_bytes: int
    bf16_bytes: int
    bits_per_weight: float  # over the quantized linears

    @property
    def ratio(self) -> float:
        """How many times smaller than bf16."""
        return self.bf16_bytes / self.checkpoint_bytes


def check_save_dir(save_dir: str | Path) -> Path:
    """Raise before any work is spent when `save_dir` cannot become the result."""
    path = Path(save_dir)
    if path.is_file():
        raise UsageError(f"{path}: the save directory is a file; name another")
    if path.is_dir() and any(path.iterdir()):
        raise UsageError(f"{path}: the save directory is not empty; name another or empty it")
    ancestor = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    try:
        os.rmdir(tempfile.mkdtemp(dir=ancestor, prefix=".lrquant-"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from None
    return path


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A temporary directory that becomes `target` when the block ends well and vanishes when it does not."""
    made = [parent for parent in (target.absolute().parent, *target.absolute().parents) if not parent.exists()]
    temporary = None
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.absolute().parent, prefix=f".{target.name}-"))
        yield temporary
        temporary.chmod(0o755)
        os.replace(temporary, target)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            if parent.exists():
                os.rmdir(parent)
        if isinstance(error, OSError) and error.strerror:
            raise LrquantError(f"{target}: cannot be written ({error.strerror}); nothing was left behind") from error
        raise


def measure_sizes(model: nn.Module, result: Reconstruction, tensors: dict[str, torch.Tensor]) -> Sizes:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    quantized = bits = 0
    weights = dict(result.outside.weights)
    for path, frozen in zip(result.block_paths, result.frozen, strict=True):
        weights |= {f"{path}.{linear}": weight for linear, weight in frozen.weights.items()}
    for linear, weight in weights.items():
        quantized += weight.integers.numel()
        parts = (tensors.get(f"{linear}.weight{part}") for part in ("", "_packed", "_scale", "_zero_point"))
        bits += 8 * sum(part.nbytes for part in parts if part is not None)
    total = sum(tensor.nbytes for tensor in tensors.values())
    return Sizes(total, 2 * parameters, bits / quantized if quantized else 16.0)


def save(
    save_dir: Path,
    model: Any,
    tokenizer: Any,
    result: Reconstruction,
    recipe: Recipe,
    storage_dtype: torch.dtype,
    base_model: str,
) -> Sizes:
    """Write the quantized `model` to `save_dir` in compressed-tensors' packed format."""
    tensors = checkpoint_tensors(model, result, recipe.stored_scheme, storage_dtype)
    sizes = measure_sizes(model, result, tensors)
    config = quantization_config(model, result, recipe.stored_scheme)
    with whole_directory(save_dir) as folder:
        _save_pretrained(model, folder, tensors)
        _finish_config(folder / "config.json", config, storage_dtype)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        recipe.to_yaml(folder / RECIPE_FILE)
        (folder / "README.md").write_text(
            model_card(base_model, recipe, sizes, config, result, auto_model(model.config).__name__)
        )
    return sizes


def _save_pretrained(model: Any, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, state_dict=tensors)
    finally:
        if shown:
            logging.enable_progress_bar()


def _finish_config(path: Path, config: dict[str, Any], storage_dtype: torch.dtype) -> None:
    values = json.loads(path.read_text())
    values["quantization_config"] = config
    values["dtype"] = str(storage_dtype).removeprefix("torch.")
    if config["quant_method"] == OWN_METHOD:
        values[BASE_MODEL_TYPE] = values["model_type"]
        values["model_type"] = OWN_MODEL_TYPE
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
