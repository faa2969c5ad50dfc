"""A block's quantized parameters as a pure function of its learnables, used both for learning and for freezing.

The learnables and their effects are defined in `lrquant.reconstruction.learnables`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lrquant.formats import Factors, fake_quantize_weight, quantize_weight
from lrquant.formats.fake_quant import QuantizedWeight, largest_weight
from lrquant.formats.gptq import compensating_offsets
from lrquant.reconstruction.fixed_parameters import BlockParameters
from lrquant.reconstruction.learnables import edits_of
from lrquant.reconstruction.learnables.rounding_offset import RoundingOffset
from lrquant.runtime.profile import timed
from lrquant.transforms import Edits, applied, materialize
from lrquant.transforms.statistics import ChannelStatistics


def sharing_inputs(statistics: Mapping[str, ChannelStatistics]) -> dict[str, str]:
    """For each linear, the first linear with the same input (maybe itself): runtimes fuse queries, keys and values."""
    first: dict[str, str] = {}
    for name, seen in statistics.items():
        same = (other for other in first.values() if _equal(seen.absmax, statistics[other].absmax))
        first[name] = next(same, name)
    return first


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


@torch.no_grad()
def gptq_offsets(
    fixed: BlockParameters, learnables: Mapping[str, Tensor], moments: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """GPTQ's rounding offsets for the block with `learnables` applied; `moments` are XᵀX by linear."""
    rounding = RoundingOffset()
    by = prepared(fixed, rounding.left_out(learnables), torch.float32)
    return rounding.named(
        {
            linear: compensating_offsets(
                by.weights.get(linear, fixed.weight(linear)),
                moments[linear],
                fixed.format_of(linear),
                by.factors[linear],
                fixed.storage_dtype,
                by.global_scales[linear],
            )
            for linear in fixed.linears
        }
    )


def _factors(edits: Edits, linear: str) -> Factors:
    """The factors, clips and offsets of a linear's weight."""
    return Factors(
        edits.row.get(linear),
        edits.column.get(linear),
        edits.clip_low.get(linear),
        edits.clip_high.get(linear),
        edits.gain.get(linear),
        edits.offset.get(linear),
    )


def _global_scales(fixed: BlockParameters, edits: Edits) -> dict[str, Tensor | None]:
    """The global scale of every weight, (1,) each; weights with the same input share one, as runtimes fuse them."""
    if fixed.format is None or not fixed.format.scales.has_global:
        return dict.fromkeys(fixed.linears)
    most: dict[str, Tensor] = {}
    for linear in fixed.linears:
        found = largest_weight(edits.weight.get(linear, fixed.weight(linear)), _factors(edits, linear))
        first = fixed.together.get(linear, linear)
        most[first] = found if first not in most else torch.maximum(most[first], found)
    return {
        linear: fixed.format.global_scale(most[fixed.together.get(linear, linear)], fixed.storage_dtype)
        for linear in fixed.linears
    }


def _unrounded(fixed: BlockParameters, edits: Edits) -> dict[str, Tensor]:
    """The parameters that `edits` change and that are not rounded: norms, biases, and the weights of routers."""
    changed = applied(fixed.tensors, edits)
    left = [linear for linear in changed.linears if linear not in fixed.linears]
    return dict(changed.vectors) | {f"{linear}.weight": changed.written(fixed.tensors, linear) for linear in left}


class Prepared(NamedTuple):
    """The effect of learnables before rounding: small tensors, except those with a value for every weight."""

    vectors: dict[str, Tensor]  # parameter name → norm's or router's weight, or bias, as the checkpoint rounds it
    factors: dict[str, Factors]  # by linear
    multipliers: dict[str, Tensor]  # by linear, (out, in): factors on dequantized weights
    global_scales: dict[str, Tensor | None]  # by linear, (1,), where the format has one
    weights: dict[str, Tensor]  # by linear, (out, in): in place of its own


def prepared(fixed: BlockParameters, learnables: Mapping[str, Tensor], dtype: torch.dtype) -> Prepared:
    """The factors, norms and biases that `learnables` give, in `dtype`; differentiable."""
    edits = edits_of(fixed, learnables)
    return Prepared(
        {name: value.to(fixed.storage_dtype).to(dtype) for name, value in _unrounded(fixed, edits).items()},
        {linear: _factors(edits, linear) for linear in fixed.linears},
        edits.multiplier,
        _global_scales(fixed, edits),
        edits.weight,
    )


def rounded_weights(
    fixed: BlockParameters, weights: Mapping[str, Tensor], by: Prepared, dtype: torch.dtype, product: torch.dtype
) -> dict[str, Tensor]:
    """Fake-quantized `weights`, each (out, in) by its parameter's name, in the precision of the products."""
    result = {}
    for linear in fixed.linears:
        weight, format = by.weights.get(linear, weights[f"{linear}.weight"]), fixed.format_of(linear)
        factors, global_scale = by.factors[linear], by.global_scales[linear]
        if linear in by.multipliers:
            weight = fake_quantize_weight(weight, format, factors, fixed.storage_dtype, global_scale=global_scale)
            weight = (weight * by.multipliers[linear]).to(fixed.product_dtype).to(dtype)
        else:
            weight = fake_quantize_weight(
                weight, format, factors, fixed.storage_dtype, fixed.product_dtype, product, global_scale
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

    `product`: the precision of matrix products, for the quantized weights, if it is another one.
    """
    if fixed.format is None:
        return {name: value.to(dtype) for name, value in transformed_parameters(fixed, learnables).items()}
    by = prepared(fixed, learnables, dtype)
    return by.vectors | rounded_weights(fixed, fixed.tensors, by, dtype, product or dtype)


def transformed_parameters(fixed: BlockParameters, learnables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The block's parameters as `learnables` transform them, without rounding: those of an equivalent block."""
    return materialize(fixed.tensors, applied(fixed.tensors, edits_of(fixed, learnables)))


@dataclass(frozen=True)
class FrozenBlock:
    """A block's final parameters: quantized weights, and everything that stays in floating point."""

    weights: Mapping[str, QuantizedWeight]  # linear → codes, scales, zero points
    dense: Mapping[str, Tensor]  # parameter name → values in the storage dtype
    product_dtype: torch.dtype = torch.float32
    static_scales: Mapping[str, Tensor] = field(default_factory=dict)  # tensor's name → a calibrated scale, (1,)

    def floating_point(self) -> Iterator[tuple[str, Tensor]]:
        """Everything that is not codes or zero points, by name."""
        yield from self.dense.items()
        for linear, weight in self.weights.items():
            for part, value in weight._asdict().items():
                if part != "codes" and isinstance(value, Tensor) and value.is_floating_point():
                    yield f"{linear}.{part}", value

    def cpu(self) -> "FrozenBlock":
        """The same in host memory."""
        weights = {
            name: weight._replace(
                codes=weight.codes.cpu(),
                scale=weight.scale.cpu(),
                zero=None if weight.zero is None else weight.zero.cpu(),
                global_scale=None if weight.global_scale is None else weight.global_scale.cpu(),
            )
            for name, weight in self.weights.items()
        }
        return replace(self, weights=weights, dense={name: tensor.cpu() for name, tensor in self.dense.items()})

    def parameters(self, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """As `quantized_parameters`, but from the values of the checkpoint; each is computed on access."""
        return _Parameters(self, dtype)


def buffers_of(block: nn.Module, storage_dtype: torch.dtype) -> dict[str, Tensor]:
    """What a checkpoint holds of a block besides its parameters."""
    parameters = {name for name, _ in block.named_parameters()}
    return {
        name: tensor.to(storage_dtype) if tensor.is_floating_point() else tensor
        for name, tensor in block.state_dict().items()
        if name not in parameters
    }


@dataclass(frozen=True)
class _Parameters(Mapping[str, Tensor]):
    """A frozen block's parameters, computed on access: all of them together would be a second block in memory."""

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


@timed("freeze")
@torch.no_grad()
def freeze(fixed: BlockParameters, learnables: Mapping[str, Tensor]) -> FrozenBlock:
    """Codes, scales and zero points of the learned block; dense weights if these cannot hold a learnable."""
    if fixed.format is None:
        dense = transformed_parameters(fixed, learnables)
        return FrozenBlock({}, {name: value.to(fixed.storage_dtype) for name, value in dense.items()})
    edits = edits_of(fixed, learnables)
    dense = dict(fixed.tensors) | _unrounded(fixed, edits)
    global_scales = _global_scales(fixed, edits)
    weights = {}
    for linear in fixed.linears:
        own = dense.pop(f"{linear}.weight")
        weight = quantize_weight(
            edits.weight.get(linear, own),
            fixed.format_of(linear),
            _factors(edits, linear),
            fixed.storage_dtype,
            global_scales[linear],
        )
        if linear in edits.multiplier:
            dense[f"{linear}.weight"] = weight.dequantized() * edits.multiplier[linear]
            continue
        weights[linear] = weight
    stored = {name: value.to(fixed.storage_dtype) for name, value in dense.items()}
    return FrozenBlock(weights, stored, fixed.product_dtype)
