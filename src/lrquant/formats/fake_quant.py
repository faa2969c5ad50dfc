"""Differentiable fake quantization as one autograd function, shared by weights and activations.

The formulas are in `lrquant.formats.fake_quant_math`. The forward pass saves only its inputs and the minimum and
maximum of every group; the backward pass recomputes the rest. Weights are passed with the diagonal scalings of an
equivalent transformation, W' = diag(row)·W·diag(column), whose gradients are row and column sums, so no transformed
weight is kept.

A group can also be a block of R × C values. Such a weight is rearranged into a matrix with one row for each row of
blocks and groups of R·C values, and then treated like groups of a row (`_in_blocks`).
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrquant.formats import kernels
from lrquant.formats.fake_quant_math import (
    Factors,
    Rounding,
    extremes,
    grouped,
    place_on_grid,
    range_of,
    scaled,
    stored_scale,
)
from lrquant.formats.number_format import NumberFormat
from lrquant.formats.qparams import WEIGHT_SCALE_FLOOR


class _FakeQuantize(torch.autograd.Function):
    """x̂ of `x` (rows…, width). Factors (fake_quant_math.Factors, in their order) are for two-dimensional `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: Rounding, *factors: Tensor | None) -> Tensor:  # type: ignore[override]
        order = _dense_order(x)
        rows, shape = _as_rows(x, order)
        result, low, high = kernels.quantize(rows, Factors(*factors), how)
        ctx.save_for_backward(x, low, high, *factors)
        ctx.settings = how, order
        return _from_rows(result, shape, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, low, high, *factors = ctx.saved_tensors
        how, order = ctx.settings
        rows, shape = _as_rows(x, order)
        wanted = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:])
        found = kernels.gradients(rows, Factors(*factors), low, high, _as_rows(grad, order)[0], how, wanted)
        return None if found.x is None else _from_rows(found.x, shape, order), None, *found[1:]


def _dense_order(x: Tensor) -> tuple[int, ...]:
    """Leading dimensions from far to near in memory: in this order a transposed `x` is a matrix without a copy."""
    return tuple(sorted(range(x.ndim - 1), key=x.stride, reverse=True))


def _as_rows(x: Tensor, order: tuple[int, ...]) -> tuple[Tensor, torch.Size]:
    """`x` (rows…, width) as a matrix of its rows in memory's order, and the shape before flattening."""
    permuted = x.permute(*order, -1)
    return permuted.reshape(-1, x.shape[-1]), permuted.shape


def _from_rows(rows: Tensor, shape: torch.Size, order: tuple[int, ...]) -> Tensor:
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return rows.view(shape).permute(*inverse, -1)


def fake_quantize(
    x: Tensor, format: NumberFormat, out_dtype: torch.dtype | None = None, global_scale: Tensor | None = None
) -> Tensor:
    """Round activations `x` (..., features) to `format`, one range per token (or group of features).

    The result equals compressed-tensors' fake quantization bit for bit, in `out_dtype` or `x`'s own. `global_scale`,
    (1,), is for formats that have one; None: found from `x`.
    """
    if global_scale is None:
        global_scale = format.global_scale(x.detach().abs().amax())
    return _FakeQuantize.apply(x, Rounding(format, None, out_dtype=out_dtype, global_scale=global_scale), *Factors())


@torch.no_grad()
def largest_weight(weight: Tensor, factors: Factors) -> Tensor:
    """The largest magnitude in diag(row)·W·diag(column), (), from which a global scale is computed."""
    return scaled(weight, factors, None).abs().amax()


def fake_quantize_weight(
    weight: Tensor,  # (out, in)
    format: NumberFormat,
    factors: Factors = Factors(),  # noqa: B008 - an immutable tuple
    scale_dtype: torch.dtype | None = None,
    product_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    global_scale: Tensor | None = None,  # (1,)
) -> Tensor:
    """The dequantized weight (out, in) of diag(row)·W·diag(column), differentiable in all but the formats.

    `scale_dtype`: what the checkpoint holds of scales; `product_dtype`: in which a loader multiplies; `global_scale`:
    where the format has one. Factors `clip_low` and `clip_high` are (`format.scale_shape`, 1).
    """
    how = Rounding(format, WEIGHT_SCALE_FLOOR, scale_dtype, product_dtype, out_dtype, global_scale)
    if format.group_rows == 1:
        return _FakeQuantize.apply(weight, how, *factors)
    rows, factors, how = _in_blocks(weight, factors, how)
    return _from_blocks(_FakeQuantize.apply(rows, how, *factors), format, weight.shape)


def _in_blocks(weight: Tensor, factors: Factors, how: Rounding) -> tuple[Tensor, Factors, Rounding]:
    """The transformed weight with a row for each row of blocks, its remaining factors, and how its rows are rounded.

    A last row of blocks that is not full is filled up with zeros, which change no range.
    """
    if factors.gain is not None:
        raise ValueError("rows that share a scale cannot have a factor each")
    rows = _to_blocks(scaled(weight, factors, None).flatten(-2), how.format)
    offset = None if factors.offset is None else _to_blocks(factors.offset, how.format)
    size = how.format.group_rows * (how.format.group_size or weight.shape[1])
    row_wise = replace(how.format, group_size=size, group_rows=1)
    return rows, Factors(None, None, factors.clip_low, factors.clip_high, None, offset), replace(how, format=row_wise)


def _to_blocks(x: Tensor, format: NumberFormat) -> Tensor:
    """(out, in) → (rows of blocks, blocks · R · C)."""
    height = format.group_rows
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % height))
    return grouped(x.unflatten(0, (-1, height)), format.group_size).transpose(1, 2).flatten(1)


def _from_blocks(x: Tensor, format: NumberFormat, shape: torch.Size) -> Tensor:
    """The inverse of `_to_blocks`, in the original's `shape`."""
    groups = format.groups(shape[1])
    return x.unflatten(1, (groups, format.group_rows, -1)).transpose(1, 2).flatten(2).flatten(0, 1)[: shape[0]]


class QuantizedWeight(NamedTuple):
    """A linear's weight as stored in a checkpoint."""

    codes: Tensor  # (out, in), in one byte each: Elements.encode
    scale: Tensor  # (rows of groups, groups): NumberFormat.scale_shape
    zero: Tensor | None  # the same shape, int8; None when symmetric
    format: NumberFormat
    global_scale: Tensor | None = None  # (1,) float32, which `scale` includes

    def steps(self) -> Tensor:
        """q − z in groups, (out, groups, group size), in float32."""
        q = grouped(self.format.elements.decode(self.codes), self.codes.shape[1] // self.scale.shape[1])
        return q if self.zero is None else q - self.zero.float()[..., None]

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(q − z)·s rounded to `dtype`, (out, in). In float32 the product of numbers of few bits is exact."""
        scale = self.format.per_row(self.scale.float()[..., None], len(self.codes))
        return (self.steps() * scale).flatten(-2).to(dtype)


@torch.no_grad()
def quantize_weight(
    weight: Tensor,  # (out, in)
    format: NumberFormat,
    factors: Factors = Factors(),  # noqa: B008 - an immutable tuple
    scale_dtype: torch.dtype | None = None,
    global_scale: Tensor | None = None,  # (1,)
) -> QuantizedWeight:
    """The codes, scales and zero points behind `fake_quantize_weight` of the same arguments."""
    how = Rounding(format, WEIGHT_SCALE_FLOOR, scale_dtype, global_scale=global_scale)
    rows, shape = weight, weight.shape
    if format.group_rows > 1:
        rows, factors, how = _in_blocks(weight, factors, how)
    y = scaled(rows, factors, how.format.group_size)
    found = range_of(*extremes(y), factors, how)
    q = format.elements.nearest(place_on_grid(y, found, factors, how).clamp_(format.low, format.high)).flatten(-2)
    zero = None if found.zero is None else found.zero.squeeze(-1).to(torch.int8)
    scale = stored_scale(found, factors, how).expand_as(found.scale).squeeze(-1)
    codes = format.elements.encode(q if format.group_rows == 1 else _from_blocks(q, format, shape))
    return QuantizedWeight(codes, scale, zero, format, global_scale)
