"""Differentiable uniform affine quantization as one autograd function, shared by weights and activations.

For a group of values with clipped extremes m ≤ 0 ≤ M, signed n-bit integers q ∈ [−2ⁿ⁻¹, 2ⁿ⁻¹ − 1]:

    asymmetric   s = (M − m)/(2ⁿ − 1)          z = round(clamp(qmin − m/s))
    symmetric    s = max(|m|, M)·2/(2ⁿ − 1)    z = 0
    q = round(clamp(x/s + z + v))              x̂ = (q − z)·s

(v is a learned rounding offset in [−½, ½], zero unless given.) The operations, their order and their
dtype are compressed-tensors', so integers, scales and zero points agree with it bit for bit.

Rounding is straight-through (its derivative is 1), everything else is differentiated exactly. Inside the
clipping range x̂ moves with x, outside it with the end of the range:

    inside     dx̂ = dx + s·dv + (q − z − x/s)·ds
    outside    dx̂ = dm + (q − z − m/s)·ds            (with z's own clamp open)

The forward saves its inputs and nothing else; the backward recomputes the rest. Weights are passed with
the diagonal scalings of an equivalent transformation, W' = diag(row)·W·diag(column), whose gradients are
row and column sums: no transformed weight outlives the call.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

WEIGHT_SCALE_FLOOR = 1e-5


@dataclass(frozen=True)
class Grid:
    """Signed integers of `bits` bits; `group_size` values share a scale (None: a whole row does)."""

    bits: int
    symmetric: bool = False
    group_size: int | None = None

    @classmethod
    def of(cls, args: QuantizationArgs) -> "Grid":
        return cls(args.num_bits, args.symmetric, args.group_size if args.strategy == "group" else None)

    @property
    def low(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def steps(self) -> int:
        return 2**self.bits - 1


class Range(NamedTuple):
    """Scale and zero point of each group, and which of their clamps are open (for the backward)."""

    scale: Tensor  # (..., groups, 1)
    zero: Tensor | None  # same shape, whole numbers; None when symmetric
    scale_open: Tensor  # bool: the floor did not replace the scale
    zero_open: Tensor | None  # bool: the zero point was not clamped


def find_range(low: Tensor, high: Tensor, grid: Grid, floor: float | None, scale_dtype: torch.dtype | None) -> Range:
    """Scale and zero point for groups whose extremes are `low` ≤ 0 ≤ `high`, each (..., groups, 1).

    `floor` is the least scale; None replaces only a scale of zero, by the dtype's epsilon, which is
    compressed-tensors' rule. `scale_dtype` rounds the scale to what the checkpoint can hold.
    """
    steps = low.new_full((), grid.steps)  # no plain number: CUDA would multiply by its reciprocal, which rounds twice
    scale = torch.maximum(-low, high) / (steps / 2) if grid.symmetric else (high - low) / steps
    if scale_dtype is not None:
        scale = scale.to(scale_dtype).to(low.dtype)
    least = floor if floor is not None else torch.finfo(scale.dtype).eps
    scale_open = scale >= floor if floor is not None else scale != 0
    scale = torch.where(scale_open, scale, torch.full_like(scale, least))
    if scale_dtype is not None:
        scale = scale.to(scale_dtype).to(low.dtype)
    if grid.symmetric:
        return Range(scale, None, scale_open, None)
    zero = grid.low - low / scale
    zero_open = (zero >= grid.low) & (zero <= grid.high)
    return Range(scale, zero.clamp_(grid.low, grid.high).round_(), scale_open, zero_open)


def to_grid(x: Tensor, found: Range, offset: Tensor | None) -> Tensor:
    """Where `x` (..., groups, g) falls on the grid, before clamping and rounding."""
    q = x / found.scale
    if found.zero is not None:
        q += found.zero
    if offset is not None:
        q += offset
    return q


def _scaled(x: Tensor, row: Tensor | None, column: Tensor | None) -> Tensor:
    if row is None:
        return x if column is None else x * column
    x = x * row[:, None]
    return x if column is None else x.mul_(column)


def _grouped(x: Tensor, group_size: int | None) -> Tensor:
    return x.unflatten(-1, (-1, group_size or x.shape[-1]))


class _FakeQuantize(torch.autograd.Function):
    """x̂ of `x` (rows…, width), see the file's formulas. Optional tensors are None when unused."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,  # (rows…, width)
        row: Tensor | None,  # (rows,)
        column: Tensor | None,  # (width,)
        clip_low: Tensor | None,  # (rows, groups, 1) factor on the minimum, in (0, 1]
        clip_high: Tensor | None,  # same, on the maximum
        offset: Tensor | None,  # (rows, width) in [−½, ½]
        grid: Grid,
        floor: float | None,
        scale_dtype: torch.dtype | None,
    ) -> Tensor:
        ctx.save_for_backward(x, row, column, clip_low, clip_high, offset)
        ctx.settings = grid, floor, scale_dtype
        y, found, *_ = _FakeQuantize.evaluate(x, row, column, clip_low, clip_high, grid, floor, scale_dtype)
        q = to_grid(y, found, None if offset is None else _grouped(offset, grid.group_size))
        q.clamp_(grid.low, grid.high).round_()
        if found.zero is not None:
            q -= found.zero
        return q.mul_(found.scale).flatten(-2)

    @staticmethod
    def evaluate(
        x: Tensor,
        row: Tensor | None,
        column: Tensor | None,
        clip_low: Tensor | None,
        clip_high: Tensor | None,
        grid: Grid,
        floor: float | None,
        scale_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Range, Tensor, Tensor]:
        """(values in groups, their range, minima, maxima) after the diagonal scalings."""
        y = _grouped(_scaled(x, row, column), grid.group_size)
        low, high = y.amin(-1, keepdim=True).clamp_(max=0), y.amax(-1, keepdim=True).clamp_(min=0)
        clipped_low = low if clip_low is None else low * clip_low
        clipped_high = high if clip_high is None else high * clip_high
        return y, find_range(clipped_low, clipped_high, grid, floor, scale_dtype), low, high

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, row, column, clip_low, clip_high, offset = ctx.saved_tensors
        grid, floor, scale_dtype = ctx.settings
        y, found, low, high = _FakeQuantize.evaluate(x, row, column, clip_low, clip_high, grid, floor, scale_dtype)
        q = to_grid(y, found, None if offset is None else _grouped(offset, grid.group_size))
        inside = q == q.clamp(grid.low, grid.high)
        q.clamp_(grid.low, grid.high).round_()
        grad = _grouped(grad, grid.group_size)
        clipped_low = low if clip_low is None else low * clip_low
        clipped_high = high if clip_high is None else high * clip_high

        grad_inside = grad * inside
        outside_sum = (grad - grad_inside).sum(-1, keepdim=True)
        if found.zero is not None:
            q -= found.zero
        grad_scale = (grad * q).sum(-1, keepdim=True) - (grad_inside * y).sum(-1, keepdim=True) / found.scale
        if found.zero_open is None:  # symmetric
            grad_scale = grad_scale * found.scale_open / (grid.steps / 2)
            lower_leads = -clipped_low >= clipped_high
            grad_low, grad_high = -grad_scale * lower_leads, grad_scale * ~lower_leads
        else:
            zero_moves = outside_sum * found.zero_open
            grad_scale = (grad_scale - zero_moves * clipped_low / found.scale) * found.scale_open / grid.steps
            grad_low, grad_high = zero_moves - grad_scale, grad_scale

        grad_clip_low = grad_low * low if ctx.needs_input_grad[3] else None
        grad_clip_high = grad_high * high if ctx.needs_input_grad[4] else None
        grad_offset = (grad_inside * found.scale).flatten(-2) if ctx.needs_input_grad[5] else None
        if not any(ctx.needs_input_grad[:3]):
            return None, None, None, grad_clip_low, grad_clip_high, grad_offset, None, None, None

        # The extremes are values of the group themselves: their gradient goes to the first that attains them.
        to_low = grad_low * (low < 0) if clip_low is None else grad_low * clip_low * (low < 0)
        to_high = grad_high * (high > 0) if clip_high is None else grad_high * clip_high * (high > 0)
        grad_y = grad_inside
        grad_y.scatter_add_(-1, y.argmin(-1, keepdim=True), to_low.to(grad_y.dtype))
        grad_y.scatter_add_(-1, y.argmax(-1, keepdim=True), to_high.to(grad_y.dtype))
        grad_y = grad_y.flatten(-2)
        grad_x = _scaled(grad_y, row, column) if ctx.needs_input_grad[0] else None
        grad_row = grad_column = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            product = grad_y * x
            if ctx.needs_input_grad[1]:
                grad_row = product.sum(-1) if column is None else product @ column
            if ctx.needs_input_grad[2]:
                grad_column = product.sum(0) if row is None else row @ product
        return grad_x, grad_row, grad_column, grad_clip_low, grad_clip_high, grad_offset, None, None, None


def fake_quantize(x: Tensor, args: QuantizationArgs) -> Tensor:
    """Round activations `x` (..., features) to the grid of `args`, one range per token (or group of features).

    The result has `x`'s dtype and equals compressed-tensors' dynamic fake quantization bit for bit.
    """
    return _FakeQuantize.apply(x, None, None, None, None, None, Grid.of(args), None, None)


def fake_quantize_weight(
    weight: Tensor,  # (out, in)
    grid: Grid,
    row: Tensor | None = None,  # (out,)
    column: Tensor | None = None,  # (in,)
    clip_low: Tensor | None = None,  # (out, groups, 1) in (0, 1]
    clip_high: Tensor | None = None,  # (out, groups, 1) in (0, 1]
    offset: Tensor | None = None,  # (out, in) in [−½, ½]
    scale_dtype: torch.dtype | None = None,
) -> Tensor:
    """The dequantized weight (out, in) of diag(row)·W·diag(column), differentiable in all but `grid`."""
    return _FakeQuantize.apply(weight, row, column, clip_low, clip_high, offset, grid, WEIGHT_SCALE_FLOOR, scale_dtype)


class QuantizedWeight(NamedTuple):
    """What a checkpoint holds of a linear's weight."""

    integers: Tensor  # (out, in) int8, signed
    scale: Tensor  # (out, groups)
    zero: Tensor | None  # (out, groups) int8; None when symmetric

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(q − z)·s computed in `dtype`, (out, in)."""
        q = _grouped(self.integers.to(dtype), self.integers.shape[1] // self.scale.shape[1])
        if self.zero is not None:
            q = q - self.zero.to(dtype)[..., None]
        return (q * self.scale.to(dtype)[..., None]).flatten(-2)


@torch.no_grad()
def quantize_weight(
    weight: Tensor,
    grid: Grid,
    row: Tensor | None = None,
    column: Tensor | None = None,
    clip_low: Tensor | None = None,
    clip_high: Tensor | None = None,
    offset: Tensor | None = None,
    scale_dtype: torch.dtype | None = None,
) -> QuantizedWeight:
    """The integers, scales and zero points behind `fake_quantize_weight` of the same arguments."""
    y, found, *_ = _FakeQuantize.evaluate(
        weight, row, column, clip_low, clip_high, grid, WEIGHT_SCALE_FLOOR, scale_dtype
    )
    q = to_grid(y, found, None if offset is None else _grouped(offset, grid.group_size))
    q.clamp_(grid.low, grid.high).round_()
    zero = None if found.zero is None else found.zero.squeeze(-1).to(torch.int8)
    return QuantizedWeight(q.flatten(-2).to(torch.int8), found.scale.squeeze(-1), zero)
