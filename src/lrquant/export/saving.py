"""Writing a checkpoint: whole or not at all, beside its recipe and a model card."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrquant._registration import BASE_MODEL_TYPE, OWN_METHOD, OWN_MODEL_TYPE
from lrquant.errors import LrquantError, UsageError
from lrquant.export.compressed_tensors import (
    block_tensors,
    outside_tensors,
    quantization_config,
    quantized_size,
    rounded_outside,
)
from lrquant.export.model_card import model_card
from lrquant.export.shards import ShardWriter
from lrquant.export.sizes import Sizes
from lrquant.formats import Scheme
from lrquant.loading.auto_class import auto_model
from lrquant.recipe import RECIPE_FILE, Recipe
from lrquant.reconstruction.result import Reconstruction
from lrquant.runtime import compat
from lrquant.runtime.files import sync_tree, write_sums


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
        sync_tree(temporary)
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


def measure_sizes(model: nn.Module, checkpoint_bytes: int, weights: int, bits: int, untied: int = 0) -> Sizes:
    """`weights` quantized ones take `bits`, out of a checkpoint whose tensors take `checkpoint_bytes`.

    `untied` parameters are not in the original, where they are tied to others.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters()) - untied
    return Sizes(checkpoint_bytes, 2 * parameters, bits / weights if weights else 16.0)


def sizes_in_memory(model: nn.Module, result: Reconstruction, scheme: Scheme, storage_dtype: torch.dtype) -> Sizes:
    """What a result that is not saved would take on disk."""
    total = sum(map(_bytes_of, outside_tensors(model, result, scheme, storage_dtype)))
    weights, bits = quantized_outside(model, result, scheme, storage_dtype)
    for path, frozen, tensors in zip(
        result.block_paths, result.frozen, block_tensors(model, result, scheme, storage_dtype), strict=True
    ):
        total += _bytes_of(tensors)
        within = {name.removeprefix(f"{path}."): tensor for name, tensor in tensors.items()}
        more = quantized_size(frozen.weights, within)
        weights, bits = weights + more[0], bits + more[1]
    return measure_sizes(model, total, weights, bits, result.rotated.untied)


def quantized_outside(
    model: nn.Module, result: Reconstruction, scheme: Scheme, storage_dtype: torch.dtype
) -> tuple[int, int]:
    """(quantized weights outside the blocks, the bits that they take)."""
    return quantized_size(result.outside.weights, rounded_outside(model, result, scheme, storage_dtype))


def _bytes_of(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def write_checkpoint(
    folder: Path,
    model: Any,
    tokenizer: Any,
    result: Reconstruction,
    recipe: Recipe,
    storage_dtype: torch.dtype,
    base_model: str,
    groups: Iterable[dict[str, torch.Tensor]],
    sizes_of: Callable[[int], Sizes],
) -> Sizes:
    """Fill `folder` with a checkpoint in compressed-tensors' format. `groups` yields its tensors a few at a time.

    `sizes_of` is told how many bytes the tensors took.
    """
    config = quantization_config(model, result, recipe.stored_scheme)
    shards = ShardWriter(folder)
    for tensors in groups:
        shards.add(as_stored_before(model, tensors))
    sizes = sizes_of(shards.finish())
    write_sums(folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    _finish_config(folder / "config.json", config, storage_dtype)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    recipe.to_yaml(folder / RECIPE_FILE)
    written, auto = json.loads((folder / "config.json").read_text()), auto_model(model.config).__name__
    card = model_card(base_model, recipe, sizes, config=written, result=result, auto=auto)
    (folder / "README.md").write_text(card)
    return sizes


def as_stored_before(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors` under the names that the model's own checkpoint has, where transformers renames while it loads."""
    from transformers.core_model_loading import revert_weight_conversion

    ignored = compat.ignored_on_save(model)
    return revert_weight_conversion(model, {name: tensor for name, tensor in tensors.items() if name not in ignored})


def _finish_config(path: Path, config: dict[str, Any], storage_dtype: torch.dtype) -> None:
    values = json.loads(path.read_text())
    values["quantization_config"] = config
    values["dtype"] = str(storage_dtype).removeprefix("torch.")
    if config["quant_method"] == OWN_METHOD:
        values[BASE_MODEL_TYPE] = values["model_type"]
        values["model_type"] = OWN_MODEL_TYPE
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
