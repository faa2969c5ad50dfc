"""Names of experts' linears in checkpoints, and whether plain transformers reads them.

Checkpoints of most families have one tensor for each expert's matrix, and transformers merges them when loading. It
also unpacks compressed-tensors' integers then, if they are symmetric and activations are not quantized (5.20 to 5.24).
vLLM reads the same names.

Everything else is stored in lrquant's own layout: the linears under their names here, and a mark by which
`import lrquant` makes transformers build them again (`lrquant._registration`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from compressed_tensors.config import CompressionFormat
from torch import Tensor

from lrquant.architectures.experts import LinearView, names_in_files
from lrquant.architectures.targets import has_exposed, linears_of
from lrquant.formats import Scheme
from lrquant.formats.layout import dequantized_on_load, storage_format
from lrquant.reconstruction.result import Reconstruction


def loads_plainly(model: Any, scheme: Scheme, paths: Sequence[str]) -> bool:
    """Whether plain transformers finds and unpacks in the blocks at `paths` what `scheme` makes of their linears."""
    views = {
        f"{path}.{name}"
        for path in paths
        for name, linear in linears_of(model.get_submodule(path)).items()
        if isinstance(linear, LinearView)
    }
    if not views:
        return True
    if any(map(scheme.leaves, views)):  # transformers merges packed experts, and only those
        return False
    merged = (
        storage_format(scheme) is CompressionFormat.pack_quantized
        and scheme.inputs is None
        and not scheme.mixed
        and not dequantized_on_load(scheme)
    )
    return merged and views <= names_in_files(model).keys()


def in_own_layout(model: Any, result: Reconstruction) -> bool:
    """Whether the checkpoint of `result` holds linears that its family's own code does not have as linears."""
    plain = not result.needs_lrquant and loads_plainly(model, result.recipe.stored_scheme, result.block_paths)
    return has_exposed(model) and not plain


def stored_names(model: Any, own_layout: bool) -> dict[str, str]:
    """Linears of `model` → their names in a checkpoint, where those differ."""
    return {} if own_layout else names_in_files(model)


def renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """`tensors` with linears called by `names`."""
    found = {}
    for name, tensor in tensors.items():
        linear, _, part = name.rpartition(".")
        found[f"{names[linear]}.{part}" if linear in names else name] = tensor
    return found
