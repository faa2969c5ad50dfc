"""Write a checkpoint with its recipe and model card, completely or not at all."""

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrquant._registration import BASE_MODEL_TYPE, OWN_METHOD, OWN_MODEL_TYPE
from lrquant.errors import LrquantError, UsageError
from lrquant.export.compressed_tensors import quantization_config
from lrquant.export.expert_layout import renamed, stored_names
from lrquant.export.model_card import model_card
from lrquant.export.packing import Packer
from lrquant.export.shards import ShardWriter
from lrquant.export.sizes import Sizes
from lrquant.loading.auto_class import auto_model
from lrquant.loading.source_tensors import SourceTensors
from lrquant.recipe import RECIPE_FILE
from lrquant.reconstruction.coverage import Coverage
from lrquant.reconstruction.result import Reconstruction
from lrquant.runtime import compat
from lrquant.runtime.files import sync_tree, write_sums
from lrquant.runtime.paths import permit, public_name


def check_save_dir(save_dir: str | Path) -> Path:
    """Raise before any work is done if `save_dir` cannot become the result."""
    path = Path(os.path.realpath(save_dir))
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path}: the save directory is a file; choose another")
    if os.path.ismount(path):
        raise UsageError(f"{path}: a mount point, which cannot be renamed; choose a folder in it")
    if path.is_dir() and any(path.iterdir()):
        raise UsageError(f"{path}: the save directory is not empty; choose another or empty it")
    ancestor = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    try:
        os.rmdir(tempfile.mkdtemp(dir=ancestor, prefix=".lrquant-"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from None
    return path


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A temporary directory that becomes `target` if the context ends without an error, and is deleted otherwise."""
    made = [parent for parent in (target.absolute().parent, *target.absolute().parents) if not parent.exists()]
    temporary = None
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.absolute().parent, prefix=f".{target.name}-"))
        yield temporary
        permit(temporary, 0o777)
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


def measure_sizes(packer: Packer, checkpoint_bytes: int, untied: int = 0) -> Sizes:
    """Sizes of a checkpoint whose tensors, all of which `packer` packed, take `checkpoint_bytes`.

    `untied` parameters are not in the original, where they are tied to others.
    """
    parameters = sum(parameter.numel() for parameter in packer.model.parameters()) - untied
    itemsize = packer.storage_dtype.itemsize
    spent = packer.bits / packer.weights if packer.weights else 8.0 * itemsize
    return Sizes(checkpoint_bytes, 2 * parameters, spent, itemsize)


def sizes_in_memory(model: nn.Module, result: Reconstruction, storage_dtype: torch.dtype) -> Sizes:
    """What a result that is not saved would take on disk."""
    packer = Packer(model, result.recipe.stored_scheme, storage_dtype)
    groups = itertools.chain(packer.outside(result), packer.blocks(result))
    total = sum(tensor.nbytes for tensors in groups for tensor in tensors.values())
    return measure_sizes(packer, total, result.rotated.untied)


@dataclass(frozen=True)
class About:
    """Metadata of a checkpoint besides its tensors, some of it copied from its original."""

    base: str  # the model that it was made from
    processor: Any = None  # its tokenizer, image processor, or both in one
    source: SourceTensors = field(default_factory=SourceTensors)
    coverage: Coverage | None = None


def write_checkpoint(
    folder: Path,
    model: Any,
    result: Reconstruction,
    *,
    groups: Iterable[dict[str, torch.Tensor]],
    storage_dtype: torch.dtype,
    about: About,
    sizes_of: Callable[[int], Sizes],
) -> Sizes:
    """Fill `folder` with a checkpoint in compressed-tensors' format. `groups` yields its tensors a few at a time.

    `sizes_of` is told how many bytes the tensors took.
    """
    recipe = result.recipe
    config = quantization_config(model, result, recipe.stored_scheme)
    config["ignore"] = [*config["ignore"], *dict.fromkeys(name.rpartition(".")[0] for name in about.source.carried)]
    shards, names = ShardWriter(folder), stored_names(model, result.own_layout)
    for tensors in groups:
        shards.add(as_stored_before(model, tensors, names))
    for tensors in about.source.read_carried():
        shards.add(tensors)
    sizes = sizes_of(shards.finish())
    write_sums(folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    _finish_config(folder / "config.json", config, storage_dtype)
    if about.processor is not None:
        about.processor.save_pretrained(folder)
    recipe = recipe.changed(calibration=public_name(recipe.calibration))
    recipe.to_yaml(folder / RECIPE_FILE)
    written, auto = json.loads((folder / "config.json").read_text()), auto_model(model.config).__name__
    card = model_card(about.base, recipe, sizes, config=written, result=result, auto=auto, coverage=about.coverage)
    (folder / "README.md").write_text(card)
    return sizes


def as_stored_before(
    model: Any, tensors: Mapping[str, torch.Tensor], names: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """`tensors` under the names that the model's own checkpoint has, where transformers renames while it loads.

    `names` are new ones of linears (expert_layout.stored_names).
    """
    from transformers.core_model_loading import revert_weight_conversion

    tensors = renamed(tensors, names)
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
