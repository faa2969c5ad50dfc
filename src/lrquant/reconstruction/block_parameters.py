"""A block's quantized parameters as a pure function of its learnables; the same function trains and freezes.

Learnables, by name:

    <transformation>.scale, .shift     see lrquant.transforms
    <linear>.clip_low, .clip_high      (out, groups, 1), logits of the factors on a group's minimum and maximum (LWC)
    <linear>.rotation                  (out, 1) factor on the dequantized weight's rows (LRQuant+)
    <linear>.offset                    (out, in), added before rounding (learned or compensating)
    <linear>.rotation_left, _right     (out, k), (k, in): the same with rank k; cannot fold into scales
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lrquant.formats import Factors, Grid, Scheme, fake_quantize_weight, quantize_weight
from lrquant.formats.fake_quant import QuantizedWeight, largest_weight
from lrquant.formats.fp4 import scale_of_tensor
from lrquant.formats.gptq import compensating_offsets
from lrquant.formats.layout import product_dtype
from lrquant.transforms import Equivalence, Reparameterized, materialize, reparameterize
from lrquant.transforms.statistics import ChannelStatistics

CLIP_LOGIT = 4.0  # sigmoid(4) = 0.982: nearly the whole range


@dataclass(frozen=True)
class BlockParameters:
    """What stays fixed while a block is learned."""

    tensors: Mapping[str, Tensor]  # the block's own parameters by name, float32
    linears: tuple[str, ...]
    equivalences: Sequence[Equivalence]
    grid: Grid | None  # None: weights stay in floating point
    storage_dtype: torch.dtype  # of scales, norms and biases in the checkpoint
    product_dtype: torch.dtype  # in which loaders dequantize (formats.storage)
    together: Mapping[str, str] = field(default_factory=dict)  # linear → the first of those that share its input
    bits: Mapping[str, int] = field(default_factory=dict)  # of linears whose weights have other bits than `grid`

    def grid_of(self, linear: str) -> Grid:
        """The grid of a linear's weights, where there is one."""
        assert self.grid is not None
        return replace(self.grid, bits=self.bits[linear]) if linear in self.bits else self.grid

    @classmethod
    def of(
        cls, block: nn.Module, equivalences: Sequence[Equivalence], scheme: Scheme, storage_dtype: torch.dtype
    ) -> "BlockParameters":
        """`scheme` calls linears by their names within `block`."""
        tensors = {name: parameter.detach().float() for name, parameter in block.named_parameters()}
        grid = Grid.of(scheme.weights) if scheme.weights else None
        products = product_dtype(scheme, storage_dtype)
        return cls(tensors, linear_names(block), equivalences, grid, storage_dtype, products, bits=scheme.bits)


def sharing_inputs(statistics: Mapping[str, ChannelStatistics]) -> dict[str, str]:
    """Each linear's first companion with the same input, itself among them: runtimes fuse queries, keys and values."""
    first: dict[str, str] = {}
    for name, seen in statistics.items():
        same = (other for other in first.values() if _equal(seen.absmax, statistics[other].absmax))
        first[name] = next(same, name)
    return first


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def linear_names(block: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, module in block.named_modules() if isinstance(module, nn.Linear))


def initial_smoothing(
    fixed: BlockParameters,
    statistics: Mapping[str, ChannelStatistics],
    init: str,
    alpha: float,
    shifted: Sequence[str],
) -> dict[str, Tensor]:
    """Where scales and shifts start, apart from the statistics. `shifted` names those that learn a shift."""
    learnables = {}
    for equivalence in fixed.equivalences:
        start = equivalence.initial(fixed.tensors, statistics, init, alpha)
        learnables[f"{equivalence.name}.scale"] = start["scale"].clone(memory_format=torch.contiguous_format)
        if equivalence.name in shifted:
            learnables[f"{equivalence.name}.shift"] = start["shift"].clone(memory_format=torch.contiguous_format)
    return learnables


def initial_clipping(fixed: BlockParameters) -> dict[str, Tensor]:
    assert fixed.grid is not None
    learnables = {}
    for linear in fixed.linears:
        weight = fixed.tensors[f"{linear}.weight"]
        groups = weight.shape[1] // (fixed.grid.group_size or weight.shape[1])
        for end in ("clip_low", "clip_high"):
            learnables[f"{linear}.{end}"] = weight.new_full((weight.shape[0], groups, 1), CLIP_LOGIT)
    return learnables


def initial_rotation(fixed: BlockParameters, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Rotations that start at one. Above rank 1 the further columns start small and random against zero rows."""
    learnables = {}
    for linear in fixed.linears:
        weight = fixed.tensors[f"{linear}.weight"]
        if rank == 1:
            learnables[f"{linear}.rotation"] = weight.new_ones(weight.shape[0], 1)
            continue
        left = torch.randn(weight.shape[0], rank, generator=generator).to(weight) * 0.01
        right = weight.new_zeros(rank, weight.shape[1])
        left[:, 0], right[0] = 1.0, 1.0
        learnables |= {f"{linear}.rotation_left": left, f"{linear}.rotation_right": right}
    return learnables


def initial_offsets(fixed: BlockParameters) -> dict[str, Tensor]:
    """Rounding offsets of zero: to the nearest integer."""
    return {f"{linear}.offset": torch.zeros_like(fixed.tensors[f"{linear}.weight"]) for linear in fixed.linears}


@torch.no_grad()
def compensated_offsets(
    fixed: BlockParameters, learnables: Mapping[str, Tensor], moments: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """GPTQ's offsets for the block as `learnables` leave it; `moments` are XᵀX by linear."""
    assert fixed.grid is not None
    changed = reparameterize(fixed.tensors, fixed.equivalences, learnables)
    without = {name: tensor for name, tensor in learnables.items() if not name.endswith(".offset")}
    wholes = _wholes(fixed, changed, without)
    return {
        f"{linear}.offset": compensating_offsets(
            fixed.tensors[f"{linear}.weight"],
            moments[linear],
            fixed.grid_of(linear),
            _factors(changed, without, linear),
            fixed.storage_dtype,
            wholes[linear],
        )
        for linear in fixed.linears
    }


def _factors(changed: Reparameterized, learnables: Mapping[str, Tensor], linear: str) -> Factors:
    """Everything that the learnables multiply a linear's weight by."""

    def clip(end: str) -> Tensor | None:
        logits = learnables.get(f"{linear}.{end}")
        return None if logits is None else logits.sigmoid()

    rotation = learnables.get(f"{linear}.rotation")
    return Factors(
        changed.row.get(linear),
        changed.column.get(linear),
        clip("clip_low"),
        clip("clip_high"),
        None if rotation is None else rotation[..., None],
        learnables.get(f"{linear}.offset"),
    )


def _wholes(
    fixed: BlockParameters, changed: Reparameterized, learnables: Mapping[str, Tensor]
) -> dict[str, Tensor | None]:
    """NVFP4's scale of every whole weight, (1,) each; the same for weights that runtimes fuse, which have one input."""
    if fixed.grid is None or not fixed.grid.has_whole:
        return dict.fromkeys(fixed.linears)
    most: dict[str, Tensor] = {}
    for linear in fixed.linears:
        found = largest_weight(fixed.tensors[f"{linear}.weight"], _factors(changed, learnables, linear))
        first = fixed.together.get(linear, linear)
        most[first] = found if first not in most else torch.maximum(most[first], found)
    return {linear: scale_of_tensor(most[fixed.together.get(linear, linear)]) for linear in fixed.linears}


def _rotation(learnables: Mapping[str, Tensor], linear: str) -> Tensor:
    """R = r₁ r₂ of rank k > 1, (out, in)."""
    return learnables[f"{linear}.rotation_left"] @ learnables[f"{linear}.rotation_right"]


class Prepared(NamedTuple):
    """What learnables come to before any weight is touched: small tensors, but for rounding's offsets."""

    vectors: dict[str, Tensor]  # parameter name → norm weight, norm bias or linear bias, as the checkpoint rounds it
    factors: dict[str, Factors]  # by linear
    rotations: dict[str, Tensor]  # by linear, (out, in): of rank k > 1
    wholes: dict[str, Tensor | None]  # by linear, (1,): NVFP4's scale of the whole weight


def prepared(fixed: BlockParameters, learnables: Mapping[str, Tensor], dtype: torch.dtype) -> Prepared:
    changed = reparameterize(fixed.tensors, fixed.equivalences, learnables)
    return Prepared(
        {name: value.to(fixed.storage_dtype).to(dtype) for name, value in changed.vectors.items()},
        {linear: _factors(changed, learnables, linear) for linear in fixed.linears},
        {linear: _rotation(learnables, linear) for linear in fixed.linears if f"{linear}.rotation_left" in learnables},
        _wholes(fixed, changed, learnables),
    )


def rounded_weights(
    fixed: BlockParameters, weights: Mapping[str, Tensor], by: Prepared, dtype: torch.dtype, product: torch.dtype
) -> dict[str, Tensor]:
    """Fake-quantized `weights`, each (out, in) by its parameter's name, in the precision of the products."""
    result = {}
    for linear in fixed.linears:
        weight, factors, grid = weights[f"{linear}.weight"], by.factors[linear], fixed.grid_of(linear)
        if linear in by.rotations:
            weight = fake_quantize_weight(weight, grid, factors, fixed.storage_dtype, whole=by.wholes[linear])
            weight = (weight * by.rotations[linear]).to(fixed.product_dtype).to(dtype)
        else:
            weight = fake_quantize_weight(
                weight, grid, factors, fixed.storage_dtype, fixed.product_dtype, product, by.wholes[linear]
            )
        result[f"{linear}.weight"] = weight
    return result


def quantized_parameters(
    fixed: BlockParameters,
    learnables: Mapping[str, Tensor],
    dtype: torch.dtype,
    product: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The block's parameters with every linear transformed and fake-quantized, in `dtype`; differentiable.

    `product`: another precision for the quantized weights, that of the matrix products.
    """
    if fixed.grid is None:
        changed = reparameterize(fixed.tensors, fixed.equivalences, learnables)
        return {name: value.to(dtype) for name, value in materialize(fixed.tensors, changed).items()}
    by = prepared(fixed, learnables, dtype)
    return by.vectors | rounded_weights(fixed, fixed.tensors, by, dtype, product or dtype)


@dataclass(frozen=True)
class FrozenBlock:
    """A block's final parameters: quantized weights, and everything that stays in floating point."""

    weights: Mapping[str, QuantizedWeight]  # linear → integers, scales, zero points
    dense: Mapping[str, Tensor]  # parameter name → values in the storage dtype
    product_dtype: torch.dtype = torch.float32
    input_scales: Mapping[str, Tensor] = field(default_factory=dict)  # linear → NVFP4's scale of its input, (1,)

    def floating_point(self) -> Iterator[tuple[str, Tensor]]:
        """Everything that is not integers, by name."""
        yield from self.dense.items()
        for linear, weight in self.weights.items():
            for part, value in weight._asdict().items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    yield f"{linear}.{part}", value

    def cpu(self) -> "FrozenBlock":
        """The same in host memory."""
        weights = {
            name: weight._replace(
                integers=weight.integers.cpu(),
                scale=weight.scale.cpu(),
                zero=None if weight.zero is None else weight.zero.cpu(),
                whole=None if weight.whole is None else weight.whole.cpu(),
            )
            for name, weight in self.weights.items()
        }
        return replace(self, weights=weights, dense={name: tensor.cpu() for name, tensor in self.dense.items()})

    def parameters(self, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """As `quantized_parameters`, from what the checkpoint holds; each is made when it is asked for."""
        return _Parameters(self, dtype)


@dataclass(frozen=True)
class _Parameters(Mapping[str, Tensor]):
    """A frozen block's parameters. All of them at once would be a second block in memory."""

    frozen: FrozenBlock
    dtype: torch.dtype

    def __getitem__(self, name: str) -> Tensor:
        weight = self.frozen.weights.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        found = self.frozen.dense[name] if weight is None else weight.dequantized(self.frozen.product_dtype)
        return found.to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        yield from self.frozen.dense
        yield from (f"{linear}.weight" for linear in self.frozen.weights)

    def __len__(self) -> int:
        return len(self.frozen.dense) + len(self.frozen.weights)


@torch.no_grad()
def freeze(fixed: BlockParameters, learnables: Mapping[str, Tensor]) -> FrozenBlock:
    """Integers, scales and zero points of the learned block. A rotation by rows folds into the scales."""
    changed = reparameterize(fixed.tensors, fixed.equivalences, learnables)
    if fixed.grid is None:
        dense = materialize(fixed.tensors, changed)
        return FrozenBlock({}, {name: value.to(fixed.storage_dtype) for name, value in dense.items()})
    dense = dict(fixed.tensors) | dict(changed.vectors)
    wholes = _wholes(fixed, changed, learnables)
    weights = {}
    for linear in fixed.linears:
        weight = quantize_weight(
            dense.pop(f"{linear}.weight"),
            fixed.grid_of(linear),
            _factors(changed, learnables, linear),
            fixed.storage_dtype,
            wholes[linear],
        )
        if f"{linear}.rotation_left" in learnables:
            dense[f"{linear}.weight"] = weight.dequantized() * _rotation(learnables, linear)
            continue
        weights[linear] = weight
    stored = {name: value.to(fixed.storage_dtype) for name, value in dense.items()}
    return FrozenBlock(weights, stored, fixed.product_dtype)
