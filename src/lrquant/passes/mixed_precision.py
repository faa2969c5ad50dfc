"""Mixed precision: choose the bits of each linear's weights from measured errors, under a size budget.

A unit is the linears of a block that share an input; runtimes fuse them, so they need the same format. Its error at n
bits is the error of the full-precision block's output y if only this unit is rounded to nearest, with the best clipping
for every group:

    error = mean over tokens of ‖y_n − y‖²/‖y‖²

The error is relative, because later blocks read the residual stream through norms. Errors of different units are
assumed to add up. The choice starts with the fewest bits everywhere, and repeatedly takes the step with the largest
reduction of error per bit of storage, as long as it fits. This solves the Lagrangian of the problem exactly at every
size along the way. The size of a weight includes its share of scales and zero points.

Several ranks share the units, not the samples, so each error is computed by one rank, and the choice is the same for
any number of ranks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from compressed_tensors.config import CompressionFormat
from torch import Tensor

from lrquant.architectures.targets import experts_alike, linears_of
from lrquant.calibration.capture import capture
from lrquant.errors import UsageError
from lrquant.formats import Factors, NumberFormat, Scheme, format_of, quantize_weight
from lrquant.formats.layout import pads_zero_points, storage_format
from lrquant.loading.block_source import held
from lrquant.loading.original import Original
from lrquant.passes.definition import Pass
from lrquant.recipe import Recipe
from lrquant.reconstruction.block_forward import BlockForward
from lrquant.reconstruction.block_parameters import sharing_inputs
from lrquant.reconstruction.block_preparation import check_values
from lrquant.reconstruction.run import Run

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


def find_layer_bits(run: Run) -> dict[str, int]:
    """Bits of the weights of every linear in the blocks, by name, on average at most the recipe's target.

    Raises:
        UsageError: the target is out of reach with these groups.
    """
    assert run.recipe.target_bits is not None
    units = measured_units(run)
    chosen = choose(units, run.recipe.target_bits)
    return {linear: bits for unit, bits in zip(units, chosen, strict=True) for linear in unit.linears}


@torch.no_grad()
def measured_units(run: Run) -> list[Unit]:
    """Every block's units, measured on the full-precision stream of some samples; weights stay as they are."""
    machine, ranks = run.machine, run.machine.ranks
    units: list[Unit] = []
    for place in run.places:
        if place.within == 0:
            run.block_source.take(place.path)  # one block shows what blocks return
            inputs = capture(run.model, place.stage.blocks(run.model), run.samples[:MOST_SAMPLES])
        with held(run.block_source, place.path, machine.device) as block:
            check_values(block, place.path)
            forward = BlockForward(block, place.within, inputs, machine.device, 1)
            before = list(inputs.hidden)
            first = sharing_inputs(forward.advance_full_precision(inputs.hidden)[0])
            for same in experts_alike(block):  # runtimes fuse all experts
                first |= dict.fromkeys(same, first[same[0]])
            scheme = run.recipe.scheme.within(place.path)
            measuring = _Measuring(forward, before, inputs.hidden, run.recipe.scheme, run.storage_dtype)
            for leader in dict.fromkeys(first.values()):
                linears = tuple(name for name in scheme.chosen(linears_of(block)) if first.get(name) == leader)
                if not linears:
                    continue
                mine = len(units) % ranks.world == ranks.rank
                units.append(measuring.unit(place.path, linears, mine))
        run.callback.measured(place.index + 1, len(run.places))
    errors = torch.tensor([[unit.errors[bits] for bits in CANDIDATES] for unit in units], dtype=torch.float64)
    together = ranks.sum(errors).tolist()  # of each row, all ranks but one have zeros
    return [
        replace(unit, errors=dict(zip(CANDIDATES, row, strict=True))) for unit, row in zip(units, together, strict=True)
    ]


@dataclass(frozen=True)
class _Measuring:
    """A block's units are measured: `before` and `after` are its full-precision inputs and outputs."""

    forward: BlockForward
    before: Sequence[Tensor]
    after: Sequence[Tensor]
    scheme: Scheme
    storage_dtype: torch.dtype

    def unit(self, path: str, linears: tuple[str, ...], measured: bool) -> Unit:
        """The unit of `linears`; without being measured its errors are zero."""
        weights = {name: self.forward.block.get_parameter(f"{name}.weight") for name in linears}
        sizes: dict[int, int] = {}
        errors: dict[int, float] = {}
        for bits in CANDIDATES:
            own = with_bits(self.scheme, bits)
            assert own.weights is not None
            format = format_of(own.weights)
            sizes[bits] = sum(storage_bits(weight.shape, own, self.storage_dtype) for weight in weights.values())
            errors[bits] = 0.0
            if measured:
                rounded = {
                    f"{name}.weight": best_rounding(weight, format, self.storage_dtype)
                    for name, weight in weights.items()
                }
                errors[bits] = self._error(rounded)
        names = tuple(f"{path}.{name}" for name in linears)
        return Unit(names, sum(weight.numel() for weight in weights.values()), sizes, errors)

    def _error(self, parameters: Mapping[str, Tensor]) -> float:
        total = 0.0
        for sample, wanted in enumerate(self.after):
            y = wanted.to(self.forward.device).float()
            found = self.forward.call_one({sample: self.before[sample]}, sample, parameters).float()
            total += float(((found - y).square().sum(-1) / y.square().sum(-1).clamp(min=1e-12)).mean())
        return total / len(self.after)


def with_bits(scheme: Scheme, bits: int) -> Scheme:
    """`scheme` with weights of `bits` everywhere."""
    return Scheme(scheme.weights, scheme.inputs, bits={"": bits}).of("")


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
    _check_reach(target, least / weights, most / weights)
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


def check_target(original: Original, recipe: Recipe) -> None:
    """Raise where the recipe's target is out of reach, which the shapes of the weights show.

    Raises:
        UsageError: it names the reach.
    """
    shapes = [
        linear.weight.shape
        for place in original.places
        for name, linear in linears_of(original.model.get_submodule(place.path)).items()
        if not recipe.scheme.within(place.path).leaves(name)
    ]
    weights = sum(shape.numel() for shape in shapes)
    sizes = [
        sum(storage_bits(shape, with_bits(recipe.scheme, bits), original.storage_dtype) for shape in shapes) / weights
        for bits in CANDIDATES
    ]
    assert recipe.target_bits is not None
    _check_reach(recipe.target_bits, min(sizes), max(sizes))


def _check_reach(target: float, least: float, most: float) -> None:
    if not least <= target <= most:
        raise UsageError(
            f"target bits {target:g}: weights with these groups, including scales, have {least:.2f} to "
            f"{most:.2f} bits on average; choose a target in between"
        )


def _carry_out(run: Run) -> None:
    run.decide(layer_bits=run.journal.bits(lambda: find_layer_bits(run)))


MIXED_PRECISION = Pass(
    "mixed precision",
    _carry_out,
    applies=lambda recipe: recipe.target_bits is not None and recipe.layer_bits is None,
    check=check_target,
)
