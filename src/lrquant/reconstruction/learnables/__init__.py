"""The table of learnables, and functions over all of them."""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lrquant.recipe import Recipe
from lrquant.reconstruction.fixed_parameters import BlockParameters
from lrquant.reconstruction.learnables.learnable import Learnable, Learnables, Start
from lrquant.transforms import Edits

__all__ = [
    "Learnable",
    "Learnables",
    "Start",
    "by_learnable",
    "edits_of",
    "first_values",
    "keep_within_bounds",
    "learnable_of",
    "parameter_groups",
    "table",
    "without_large",
]

_HELPERS = {"learnable", "rates"}


@cache
def table() -> tuple[Learnable, ...]:
    """All learnables, one per file of this folder, in alphabetical order."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name not in _HELPERS]
    return tuple(importlib.import_module(f"{__name__}.{name}").LEARNABLE for name in names)


@cache
def _by_part() -> dict[str, Learnable]:
    return {part: learnable for learnable in table() for part in learnable.parts}


def learnable_of(name: str) -> Learnable:
    """The learnable that a tensor called `owner.part` belongs to."""
    return _by_part()[name.rpartition(".")[2]]


def by_learnable(learnables: Mapping[str, Tensor]) -> dict[Learnable, Learnables]:
    """The same tensors, grouped by learnable."""
    apart: dict[Learnable, Learnables] = {}
    for name, tensor in learnables.items():
        apart.setdefault(learnable_of(name), {})[name] = tensor
    return apart


def first_values(fixed: BlockParameters, start: Start) -> Learnables:
    """Initial values of everything that the recipe learns for a block."""
    values: Learnables = {}
    for learnable in table():
        if learnable.enabled(start.recipe) and (fixed.format is not None or not learnable.on_grid):
            values |= learnable.start(fixed, start)
    return values


def edits_of(fixed: BlockParameters, learnables: Mapping[str, Tensor]) -> Edits:
    """The edits of a block's parameters that `learnables` make. Differentiable."""
    edits = Edits()
    for learnable, own in by_learnable(learnables).items():
        learnable.record(fixed, own, edits)
    return edits


def parameter_groups(learnables: Mapping[str, Tensor], recipe: Recipe, steps: int) -> list[dict[str, Any]]:
    """AdamW's parameter groups, one per learnable, with their rates for `steps` steps."""
    return [
        {"params": list(own.values()), "lr": learnable.rate(recipe, steps)}
        for learnable, own in by_learnable(learnables).items()
    ]


@torch.no_grad()
def keep_within_bounds(learnables: Mapping[str, Tensor]) -> None:
    """Clamp every tensor in place to the least value that its learnable allows."""
    for learnable, own in by_learnable(learnables).items():
        for _, part, tensor in learnable.owned(own):
            if part in learnable.least:
                tensor.clamp_(min=learnable.least[part])


def without_large(learnables: Mapping[str, Tensor]) -> Learnables:
    """`learnables` without those that have a value for every weight."""
    return {name: tensor for name, tensor in learnables.items() if not learnable_of(name).large}
