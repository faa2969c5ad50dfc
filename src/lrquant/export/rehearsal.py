"""Check that a result will load: names and shapes before the run, and the files after it.

Every block of the model's skeleton is frozen and packed on the meta device, and `from_pretrained` of the model's own
class loads the tensors, as a user will load the result. So what transformers cannot load is known before the first
block is learned. No weight is read or computed.
"""

import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrquant.architectures.targets import has_exposed, linears_of
from lrquant.errors import LrquantError, UsageError
from lrquant.export.compressed_tensors import STATIC_SCALES, quantization_config
from lrquant.export.expert_layout import in_own_layout, stored_names
from lrquant.export.packing import Packer
from lrquant.export.saving import as_stored_before
from lrquant.export.skeleton import skeleton_of
from lrquant.formats.activation_quant import CACHE_SCALES
from lrquant.loading.pretrained import first_line
from lrquant.recipe import Recipe
from lrquant.reconstruction.block_parameters import FrozenBlock, freeze
from lrquant.reconstruction.fixed_parameters import BlockParameters
from lrquant.reconstruction.result import Reconstruction
from lrquant.runtime.distributed import apart
from lrquant.runtime.memory import available_bytes


def rehearse(
    model: Any, recipe: Recipe, storage_dtype: torch.dtype, *, paths: Sequence[str], name: str
) -> dict[str, int]:
    """Raise unless plain transformers will load what `recipe` makes of `model`; returns the result's bytes by block.

    Modules outside the blocks are taken as they are, and so are biases that a shift would add.

    Raises:
        UsageError: it will not; with what transformers says.
    """
    skeleton, scheme = skeleton_of(model), recipe.stored_scheme
    result = Reconstruction(recipe, list(paths))
    try:
        result.frozen = list(_frozen_blocks(skeleton, recipe, storage_dtype, paths=paths))
        result.own_layout = in_own_layout(skeleton, result)
        names, tensors = stored_names(model, result.own_layout), dict[str, Tensor]()
        packer, sizes = Packer(skeleton, scheme, storage_dtype), dict[str, int]()
        for group in packer.outside(result):
            tensors |= as_stored_before(model, group, names)
        for path, group in zip(paths, packer.blocks(result), strict=True):
            sizes[path] = sum(tensor.nbytes for tensor in group.values())
            tensors |= as_stored_before(model, group, names)
        # Plain transformers refuses the one, and merges the other's experts by their values, which are not here.
        if result.own_layout or has_exposed(model):
            return sizes
        config = deepcopy(model.config)
        config.quantization_config = quantization_config(skeleton, result, scheme)
        found = _loaded(type(model), None, config=config, state_dict=tensors)
    except UsageError:
        raise
    except Exception as error:  # whatever transformers, compressed-tensors or torch say of it
        raise UsageError(f"{name}: transformers could not load the result ({first_line(error)})") from error
    missing = {key for key in found["missing_keys"] if not key.endswith(STATIC_SCALES)}  # those come from calibration
    _check({**found, "missing_keys": missing}, name, kind=UsageError)
    return sizes


def _frozen_blocks(
    skeleton: Any, recipe: Recipe, storage_dtype: torch.dtype, *, paths: Sequence[str]
) -> Iterator[FrozenBlock]:
    """What freezing makes of every block; blocks of the same shapes and formats share one result."""
    found: dict[Any, FrozenBlock] = {}
    for path in paths:
        block, scheme = skeleton.get_submodule(path), recipe.scheme.within(path)
        shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
        key = type(block), shapes, tuple(str(scheme.of(name).weights) for name in linears_of(block))
        if key not in found:
            fixed = BlockParameters.of(block, (), scheme, storage_dtype)
            found[key] = FrozenBlock({}, dict(fixed.tensors)) if recipe.dense else freeze(fixed, {})
        yield found[key]


def check_loads(folder: Path, model_class: Any, carried: Collection[str] = (), *, merges: bool = False) -> None:
    """Raise unless plain transformers loads the checkpoint in `folder`; nothing of it is read but headers.

    `merges`: transformers makes one tensor of several packed ones, for which it reads them all; that is done where
    there is memory for the model in float32, and left out elsewhere.

    Raises:
        LrquantError: it does not; with what transformers says.
    """
    unpacked = 8 * sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if merges and unpacked > available_bytes() // 2:
        return
    try:
        found = _loaded(model_class, folder, device_map="cpu" if merges else "meta")
    except Exception as error:
        raise LrquantError(f"{folder.name}: transformers cannot load the result ({first_line(error)})") from error
    _check(found, folder.name, carried)


def _loaded(model_class: Any, folder: Path | None, **given: Any) -> Mapping[str, Any]:
    """What transformers says of loading, onto the meta device unless another is given: keys that do not fit."""
    from loguru import logger

    logger.disable("compressed_tensors")  # it warns, tensor by tensor, of what it cannot know without weights
    try:
        with apart(), redirect_stderr(io.StringIO()):  # its progress bars cannot be turned off
            given = {"device_map": "meta"} | given
            _, found = model_class.from_pretrained(folder, output_loading_info=True, **given)
    finally:
        logger.enable("compressed_tensors")
    return found


def _check(
    found: Mapping[str, Any], name: str, carried: Collection[str] = (), *, kind: type[LrquantError] = LrquantError
) -> None:
    wrong = {
        "lacks": set(found["missing_keys"]),
        # Scales of a quantized cache are for runtimes that have one; transformers has none from 5.24 on.
        "does not expect": {key for key in found["unexpected_keys"] if not key.endswith(CACHE_SCALES)} - set(carried),
        "expects another shape of": {
            str(key[0] if isinstance(key, tuple) else key) for key in found["mismatched_keys"]
        },
    }
    for says, keys in wrong.items():
        if keys:
            raise kind(f"{name}: transformers could not load the result: it {says} {len(keys)} tensors, "
                       f"among them {min(keys)}")  # fmt: skip
