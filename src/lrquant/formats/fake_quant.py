"""Differentiable fake quantization as one autograd function, shared by weights and activations.

The formulas are in `lrquant.formats.fake_quant_math`. The forward saves its inputs and the extremes of every group, and
nothing else; the backward recomputes the rest. Weights are passed with the diagonal scalings of an equivalent
transformation, W' = diag(row)·W·diag(column), whose gradients are row and column sums: no transformed weight
outlives the call.
"""

from typing import Any, NamedTuple

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from lrquant.formats import fp4 as floats
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
    to_grid,
)
from lrquant.formats.qparams import WEIGHT_SCALE_FLOOR, Grid


class _FakeQuantize(torch.autograd.Function):
    """x̂ of `x` (rows…, width). Factors (rows.Factors, in their order) are for two-dimensional `x`."""

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
    x: Tensor, args: QuantizationArgs, out_dtype: torch.dtype | None = None, whole: Tensor | None = None
) -> Tensor:
    """Round activations `x` (..., features) to the grid of `args`, one range per token (or group of features).

    The result equals compressed-tensors' dynamic fake quantization bit for bit, in `out_dtype` or `x`'s own.
    `whole` is NVFP4's scale of the whole tensor, (1,) float32; None: found from `x`.
    """
    grid = Grid.of(args)
    if grid.has_whole and whole is None:
        whole = floats.scale_of_tensor(x.detach().abs().amax())
    return _FakeQuantize.apply(x, Rounding(grid, None, out_dtype=out_dtype, whole=whole), *Factors())


@torch.no_grad()
def largest_weight(weight: Tensor, factors: Factors) -> Tensor:
    """The largest magnitude in diag(row)·W·diag(column), (): what NVFP4's scale of a whole tensor follows."""
    return scaled(weight, factors, None).abs().amax()


def fake_quantize_weight(
    weight: Tensor,  # (out, in)
    grid: Grid,
    factors: Factors = Factors(),  # noqa: B008 - an immutable tuple
    scale_dtype: torch.dtype | None = None,
    product_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    whole: Tensor | None = None,  # (1,) float32
) -> Tensor:
    """The dequantized weight (out, in) of diag(row)·W·diag(column), differentiable in all but the formats.

    `scale_dtype`: what the checkpoint holds of scales; `product_dtype`: in which a loader multiplies; `whole`:
    NVFP4's scale of the whole tensor.
    """
    how = Rounding(grid, WEIGHT_SCALE_FLOOR, scale_dtype, product_dtype, out_dtype, whole)
    return _FakeQuantize.apply(weight, how, *factors)


class QuantizedWeight(NamedTuple):
    """What a checkpoint holds of a linear's weight."""

    integers: Tensor  # (out, in) int8, signed
    scale: Tensor  # (out, groups)
    zero: Tensor | None  # (out, groups) int8; None when symmetric
    unit: float = 1.0  # what an integer one stands for
    whole: Tensor | None = None  # (1,) float32, NVFP4's scale of the whole tensor, which `scale` includes

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(q − z)·s rounded to `dtype`, (out, in). In float32 the product of numbers of few bits is exact."""
        q = grouped(self.integers.float() * self.unit, self.integers.shape[1] // self.scale.shape[1])
        if self.zero is not None:
            q = q - self.zero.float()[..., None]
        return (q * self.scale.float()[..., None]).flatten(-2).to(dtype)


@torch.no_grad()
def quantize_weight(
    weight: Tensor,  # (out, in)
    grid: Grid,
    factors: Factors = Factors(),  # noqa: B008 - an immutable tuple
    scale_dtype: torch.dtype | None = None,
    whole: Tensor | None = None,  # (1,) float32
) -> QuantizedWeight:
    """The integers, scales and zero points behind `fake_quantize_weight` of the same arguments."""
    how = Rounding(grid, WEIGHT_SCALE_FLOOR, scale_dtype, whole=whole)
    y = scaled(weight, factors, grid.group_size)
    found = range_of(*extremes(y), factors, how)
    q = to_grid(place_on_grid(y, found, factors, how).clamp_(grid.low, grid.high), grid)
    zero = None if found.zero is None else found.zero.squeeze(-1).to(torch.int8)
    scale = stored_scale(found, factors, how).expand_as(found.scale).squeeze(-1)
    return QuantizedWeight((q / grid.unit).flatten(-2).to(torch.int8), scale, zero, grid.unit, whole)
