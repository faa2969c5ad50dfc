"""Where a block begins: what stays fixed of it while it is learned, and its learnables' first values."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lrquant.recipe import Recipe
from lrquant.reconstruction.block_optimizer import Learnables
from lrquant.reconstruction.block_parameters import (
    BlockParameters,
    FrozenBlock,
    freeze,
    initial_clipping,
    initial_offsets,
    initial_rotation,
    initial_smoothing,
    sharing_inputs,
)
from lrquant.reconstruction.block_preparation import choose_shifts
from lrquant.reconstruction.journal import FinishedBlock
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
    """(what stays fixed, what is learned as it starts, modules that were given a bias for their shifts)."""
    shifted, slots = choose_shifts(block, equivalences, recipe.shift)
    start: Learnables = {}
    if recipe.let:
        without = BlockParameters.of(block, equivalences, recipe.scheme.within(path), storage_dtype)
        start |= initial_smoothing(without, statistics, recipe.init, recipe.alpha, shifted)
    add_bias_slots(block, slots)
    fixed = fixed_of(block, path, equivalences, statistics, recipe, storage_dtype)
    if fixed.grid is not None:
        if recipe.lwc:
            start |= initial_clipping(fixed)
        if recipe.rotation:
            generator = torch.Generator().manual_seed(recipe.seed + place)
            start |= initial_rotation(fixed, recipe.rotation_rank, generator)
        if recipe.rounding == "learned":
            start |= initial_offsets(fixed)
    return fixed, start, slots


def frozen_again(
    block: nn.Module,
    path: str,
    equivalences: Sequence[Equivalence],
    finished: FinishedBlock,
    recipe: Recipe,
    storage_dtype: torch.dtype,
) -> FrozenBlock:
    """What an earlier run froze of `block`, which has the original's weights, from what that run had learned."""
    device = next(block.parameters()).device
    add_bias_slots(block, finished.added_biases)
    fixed = fixed_of(block, path, equivalences, finished.statistics, recipe, storage_dtype)
    learned: dict[str, Tensor] = {name: tensor.to(device) for name, tensor in finished.learnables.items()}
    return freeze(fixed, learned)
