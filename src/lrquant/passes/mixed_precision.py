"""Mixed precision: how many bits the weights of each linear get, from what rounding them does, under a size budget.

A unit is the linears of a block that share an input, which runtimes fuse and therefore want in one format. Its error
at n bits is what the full-precision block's output y loses when the unit alone is rounded to nearest, clipping chosen
for every group:

    error = mean over tokens of ‖y_n − y‖²/‖y‖²

relative because later blocks read the residual stream through norms. Errors of different units are taken to add up.
Then bits are spent where they buy most: from the fewest bits everywhere, the step with the largest fall of the error
per bit of storage is taken again and again while it fits, which solves the Lagrangian of the problem exactly at every
size on the way. A weight's size counts its share of scales and zero points as the checkpoint holds them.

Several ranks divide the units among them, not the samples: every error is one rank's, and the choice is the same to the
bit on any number of them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from compressed_tensors.config import CompressionFormat
from torch import Tensor, nn

from lrquant.architectures import Family, MultimodalFamily
from lrquant.calibration.capture import capture
from lrquant.errors import UsageError
from lrquant.formats import Factors, NumberFormat, Scheme, format_of, quantize_weight
from lrquant.formats.layout import pads_zero_points, storage_format
from lrquant.loading.block_source import BlockSource, held
from lrquant.recipe import Recipe
from lrquant.reconstruction.block_forward import BlockForward
from lrquant.reconstruction.block_parameters import sharing_inputs
from lrquant.reconstruction.block_preparation import check_finite
from lrquant.reconstruction.fixed_parameters import linear_names
from lrquant.runtime.distributed import ALONE, Ranks

CANDIDATES = (2, 3, 4, 5, 6, 8)  # bits
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # shares of a group's range that are tried
MOST_SAMPLES = 16  # on which errors are measured


@dataclass(frozen=True)
class Unit:
    """Linears that get the same bits; sizes in bits of storage and errors by bits a weight."""

    linears: tuple[str, ...]
    weights: int
    sizes: Mapping[int, int]
    errors: Mapping[int, float]


@dataclass(frozen=True)
class BitAllocation:
    """Finds bits for the blocks of a model, whose weights it leaves as they are. `told` hears (blocks done, of all)."""

    model: nn.Module
    family: Family | MultimodalFamily
    recipe: Recipe
    samples: Sequence[dict[str, Any]]
    device: torch.device
    storage_dtype: torch.dtype
    block_source: BlockSource
    told: Callable[[int, int], None]
    ranks: Ranks = ALONE

    def layer_bits(self) -> dict[str, int]:
        """Bits of the weights of every linear in the blocks, by name, on average at most the recipe's target.

        Raises:
            UsageError: the target is out of reach with these groups.
        """
        assert self.recipe.target_bits is not None
        units = self.units()
        chosen = choose(units, self.recipe.target_bits)
        return {linear: bits for unit, bits in zip(units, chosen, strict=True) for linear in unit.linears}

    @torch.no_grad()
    def units(self) -> list[Unit]:
        """Every block's units, measured on the full-precision stream of some samples."""
        stages = self.family.stages(self.model, self.recipe.towers)
        count = sum(len(stage.blocks(self.model)) for stage in stages)
        units: list[Unit] = []
        done = 0
        for stage in stages:
            self.block_source.take(f"{stage.path}.0")  # one block shows what blocks return
            inputs = capture(self.model, stage.blocks(self.model), self.samples[:MOST_SAMPLES])
            for index in range(len(stage.blocks(self.model))):
                path = f"{stage.path}.{index}"
                with held(self.block_source, path, self.device) as block:
                    check_finite(block, path)
                    run = BlockForward(block, index, inputs, self.device, 1)
                    before = list(inputs.hidden)
                    first = sharing_inputs(run.advance_full_precision(inputs.hidden)[0])
                    for leader in dict.fromkeys(first.values()):
                        linears = tuple(name for name in linear_names(block) if first.get(name) == leader)
                        scheme, dtype = self.recipe.scheme, self.storage_dtype
                        mine = len(units) % self.ranks.world == self.ranks.rank
                        units.append(_unit(run, path, linears, scheme, dtype, before, inputs.hidden, mine))
                done += 1
                self.told(done, count)
        errors = torch.tensor([[unit.errors[bits] for bits in CANDIDATES] for unit in units], dtype=torch.float64)
        together = self.ranks.sum(errors).tolist()  # of each row, all ranks but one have zeros
        return [
            replace(unit, errors=dict(zip(CANDIDATES, row, strict=True)))
            for unit, row in zip(units, together, strict=True)
        ]


def _unit(
    run: BlockForward,
    path: str,
    linears: tuple[str, ...],
    scheme: Scheme,
    storage_dtype: torch.dtype,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    measured: bool,
) -> Unit:
    """The unit of `linears`; without being measured its errors are zero."""
    weights = {name: run.block.get_parameter(f"{name}.weight") for name in linears}
    sizes: dict[int, int] = {}
    errors: dict[int, float] = {}
    for bits in CANDIDATES:
        own = Scheme(scheme.weights, scheme.inputs, bits=dict.fromkeys(linears, bits)).of(linears[0])
        assert own.weights is not None
        format = format_of(own.weights)
        sizes[bits] = sum(storage_bits(weight.shape, own, storage_dtype) for weight in weights.values())
        errors[bits] = 0.0
        if measured:
            rounded = {
                f"{name}.weight": best_rounding(weight, format, storage_dtype) for name, weight in weights.items()
            }
            errors[bits] = _error(run, rounded, before, after)
    names = tuple(f"{path}.{name}" for name in linears)
    return Unit(names, sum(weight.numel() for weight in weights.values()), sizes, errors)


def _error(
    run: BlockForward, parameters: Mapping[str, Tensor], before: Sequence[Tensor], after: Sequence[Tensor]
) -> float:
    total = 0.0
    for sample, wanted in enumerate(after):
        y = wanted.to(run.device).float()
        found = run.call_one({sample: before[sample]}, sample, parameters).float()
        total += float(((found - y).square().sum(-1) / y.square().sum(-1).clamp(min=1e-12)).mean())
    return total / len(after)


def best_rounding(weight: Tensor, format: NumberFormat, scale_dtype: torch.dtype) -> Tensor:
    """`weight` (out, in) rounded to nearest, each group clipped by that of `CLIPS` which changes it least."""
    w = weight.detach().float()
    groups = format.groups(w.shape[1])
    best, least = torch.zeros_like(w).unflatten(-1, (groups, -1)), w.new_full((w.shape[0], groups, 1), torch.inf)
    for share in CLIPS:
        clip = w.new_full((w.shape[0], groups, 1), share)
        found = quantize_weight(w, format, Factors(clip_low=clip, clip_high=clip), scale_dtype).dequantized()
        found = found.unflatten(-1, (groups, -1))
        error = (found - w.unflatten(-1, (groups, -1))).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, found, best), torch.minimum(error, least)
    return best.flatten(-2).to(weight.dtype)


def storage_bits(shape: Sequence[int], scheme: Scheme, storage_dtype: torch.dtype) -> int:
    """Bits that a weight (out, in) takes in the checkpoint: its integers, scales and zero points."""
    assert scheme.weights is not None
    format = format_of(scheme.weights)
    a_byte = storage_format(scheme) is CompressionFormat.int_quantized
    each = 8 if a_byte else format.bits
    zero = 0 if format.symmetric else 32 if pads_zero_points(scheme) else each
    return format.weight_bits(shape, storage_dtype, each) + math.prod(format.scale_shape(shape)) * zero


def choose(units: Sequence[Unit], target: float) -> list[int]:
    """Bits for every unit: on average over the weights at most `target`, scales and zero points included.

    Raises:
        UsageError: `target` is less than the fewest bits take, or more than the most.
    """
    weights = sum(unit.weights for unit in units)
    budget = target * weights
    least, most = (sum(end(unit.sizes.values()) for unit in units) for end in (min, max))
    if not least <= budget <= most:
        raise UsageError(
            f"target bits {target:g}: with their scales, weights of these groups take {least / weights:.2f} to "
            f"{most / weights:.2f} bits on average; name a target between"
        )
    chosen = [min(unit.sizes, key=lambda bits: (unit.sizes[bits], bits)) for unit in units]
    size = sum(unit.sizes[bits] for unit, bits in zip(units, chosen, strict=True))
    while True:
        steps = [
            ((unit.errors[now] - unit.errors[bits]) / (unit.sizes[bits] - unit.sizes[now]), -place, bits)
            for place, (unit, now) in enumerate(zip(units, chosen, strict=True))
            for bits in unit.sizes
            if 0 < unit.sizes[bits] - unit.sizes[now] <= budget - size
        ]
        gain, place, bits = max(steps, default=(0.0, 0, 0))
        if gain <= 0:
            return chosen
        size += units[-place].sizes[bits] - units[-place].sizes[chosen[-place]]
        chosen[-place] = bits
