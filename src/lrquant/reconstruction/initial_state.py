"""The initial state of a block: its fixed parameters, and the initial values of its learnables."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lrquant.recipe import Recipe
from lrquant.reconstruction.block_parameters import FrozenBlock, freeze, sharing_inputs
from lrquant.reconstruction.block_preparation import choose_shifts
from lrquant.reconstruction.fixed_parameters import BlockParameters
from lrquant.reconstruction.journal import FinishedBlock
from lrquant.reconstruction.learnables import Learnables, Start, first_values
from lrquant.transforms import Equivalence
from lrquant.transforms.bias_slots import add_bias_slots
from lrquant.transforms.statistics import ChannelStatistics


def fixed_of(
    block: nn.Module,
    path: str,
    equivalences: Sequence[Equivalence],
    statistics: Mapping[str, ChannelStatistics],
    recipe: Recipe,
    storage_dtype: torch.dtype,
) -> BlockParameters:
    """What stays fixed of `block`, which is at `path` and has the original's weights and all its biases."""
    fixed = BlockParameters.of(block, equivalences, recipe.scheme.within(path), storage_dtype)
    return replace(fixed, together=sharing_inputs(statistics))


def begin(
    block: nn.Module,
    path: str,
    place: int,
    equivalences: Sequence[Equivalence],
    statistics: Mapping[str, ChannelStatistics],
    recipe: Recipe,
    storage_dtype: torch.dtype,
) -> tuple[BlockParameters, Learnables, tuple[str, ...]]:
    """(fixed parameters, initial learnables, modules that got a bias for their shift)."""
    shifted, slots = choose_shifts(block, equivalences, recipe.shift)
    add_bias_slots(block, slots)
    fixed = fixed_of(block, path, equivalences, statistics, recipe, storage_dtype)
    return fixed, first_values(fixed, Start(recipe, place, statistics, shifted, slots)), slots


def frozen_again(
    block: nn.Module,
    path: str,
    equivalences: Sequence[Equivalence],
    finished: FinishedBlock,
    recipe: Recipe,
    storage_dtype: torch.dtype,
) -> FrozenBlock:
    """The frozen `block` of an earlier run, computed from the original's weights and that run's learnables."""
    device = next(block.parameters()).device
    add_bias_slots(block, finished.added_biases)
    fixed = fixed_of(block, path, equivalences, finished.statistics, recipe, storage_dtype)
    learned: dict[str, Tensor] = {name: tensor.to(device) for name, tensor in finished.learnables.items()}
    return freeze(fixed, learned)
