"""What a model family declares, the table of families, and inspection of unknown ones.

A family is one short file beside this one that defines `FAMILY`; dropping a file in is all it takes.
"""

import importlib
import logging
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from lrquant.errors import UsageError
from lrquant.transforms import Equivalence

log = logging.getLogger(__name__)

_HELPERS = {"family", "layouts", "gated_decoder"}


@dataclass(frozen=True)
class Family:
    """Models that share a block's structure.

    `blocks` is the path of the list of blocks inside the model, and `equivalences` gives, for a
    configuration, the transformations of a block with module names relative to it.
    """

    name: str
    model_types: tuple[str, ...]  # as in the configuration's `model_type`
    blocks: str
    equivalences: Callable[[Any], Sequence[Equivalence]]
    known: bool = True  # False: found by inspection


@cache
def _families() -> dict[str, Family]:
    package = importlib.import_module("lrquant.architectures")
    table: dict[str, Family] = {}
    for module in pkgutil.iter_modules(package.__path__):
        if module.name not in _HELPERS:
            family: Family = importlib.import_module(f"{package.__name__}.{module.name}").FAMILY
            table |= dict.fromkeys(family.model_types, family)
    return table


def family_names() -> tuple[str, ...]:
    """The `model_type`s that are known, in alphabetical order."""
    return tuple(sorted(_families()))


def family_of(model: nn.Module) -> Family:
    """The family of a transformers model, or one found by inspection, which has no transformations.

    Raises:
        UsageError: the model has no single list of equal blocks with linears in them.
    """
    model_type = str(model.config.model_type)  # type: ignore[union-attr]
    return _families().get(model_type) or _inspect(model, model_type)


def _inspect(model: nn.Module, model_type: str) -> Family:
    """The longest list of modules of one class that hold linears is taken for the blocks."""
    candidates = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and len({type(block) for block in module}) == 1
        and any(isinstance(part, nn.Linear) for part in module[0].modules())
    }
    outermost = {
        name: module
        for name, module in candidates.items()
        if not any(name.startswith(f"{other}.") for other in candidates)
    }
    if len(outermost) != 1:
        found = ", ".join(outermost) or "none"
        raise UsageError(
            f"model type {model_type!r} is not known, and its blocks cannot be found by inspection "
            f"(lists of equal blocks: {found}); known are {', '.join(family_names())}"
        )
    (path,) = outermost
    log.warning(
        "Model type %r is not known: its blocks were found at %s; weight clipping only, no smoothing.", model_type, path
    )
    return Family(model_type, (model_type,), path, lambda config: (), known=False)
