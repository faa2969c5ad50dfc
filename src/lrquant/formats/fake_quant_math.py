"""The arithmetic of fake quantization on rows, forward and backward, as plain functions of tensors.

A row is an output channel of a weight or a token's activations. With y = diag(row)·x·diag(column), scale s and
zero point z of each group (lrquant.formats.number_format), and a factor r on the dequantized values:

    q = round(clamp(y/s + z + v))        x̂ = (q − z)·(s·r)

(v is an offset that rounding learns, in units of the scale or of the numbers' spacing; r is LRQuant+'s rotation
vector.) Rounding is straight-through (its derivative is 1), everything else is differentiated exactly. Inside the
clipping range x̂ moves with y, outside it with the end m of the range, which the zero point follows:

    inside     dx̂/r = dy + s·dv + (q − z − y/s)·ds
    outside    dx̂/r = dm + (q − z − m/s)·ds            (with z's own clamp open)

Where a format's numbers are not integers, round finds the nearest of them.

The extremes are values of the group themselves: their gradient goes to the elements that attain them, in equal
parts. Of all gradients only those of y and v are as large as the weight; those of row, clips and r are sums
along rows, that of column is a sum along columns. `lrquant.formats.kernels` decides how these functions run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lrquant.formats.number_format import NumberFormat, Range


class Factors(NamedTuple):
    """What a row's values are multiplied by before, at and after rounding. All optional."""

    row: Tensor | None = None  # (rows,), non-zero
    column: Tensor | None = None  # (width,)
    clip_low: Tensor | None = None  # (rows, groups, 1), factor on the minimum, in (0, 1]
    clip_high: Tensor | None = None  # same, on the maximum
    gain: Tensor | None = None  # (rows, groups or 1, 1), factor on the dequantized values
    offset: Tensor | None = None  # (rows, width), added before rounding

    def of_rows(self, rows: slice) -> "Factors":
        """The factors of some of the rows."""
        return Factors(*(each if each is None or each is self.column else each[rows] for each in self))


@dataclass(frozen=True)
class Rounding:
    """How rows are rounded, and into which precisions."""

    format: NumberFormat  # whose groups are parts of a row
    floor: float | None  # the least scale (number_format.Scales.range)
    scale_dtype: torch.dtype | None = None  # what the checkpoint holds of scales; None: the values' own
    product_dtype: torch.dtype | None = None  # in which (q − z)·s is computed; None: the values' own
    out_dtype: torch.dtype | None = None  # of x̂; None: the values' own
    global_scale: Tensor | None = field(default=None, compare=False)  # (1,), where the format has one


class Gradients(NamedTuple):
    """Gradients of x and of each factor, in their order; None where not wanted."""

    x: Tensor | None
    row: Tensor | None
    column: Tensor | None
    clip_low: Tensor | None
    clip_high: Tensor | None
    gain: Tensor | None
    offset: Tensor | None


def grouped(x: Tensor, group_size: int | None) -> Tensor:
    """`x`, (…, columns), as (…, groups, group size); None: one group for the entire row."""
    return x.unflatten(-1, (-1, group_size or x.shape[-1]))


def scaled(x: Tensor, factors: Factors, group_size: int | None) -> Tensor:
    """y in groups, (rows, groups, g)."""
    if factors.row is not None:
        x = x * factors.row[:, None]
    if factors.column is not None:
        x = x * factors.column
    return grouped(x, group_size)


def extremes(y: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of every group of `y`, zero included: (rows, groups, 1) each."""
    return y.amin(-1, keepdim=True).clamp(max=0), y.amax(-1, keepdim=True).clamp(min=0)


def range_of(low: Tensor, high: Tensor, factors: Factors, how: Rounding) -> Range:
    """Scales and zero points for each group's minimum `low` and maximum `high`, (rows, groups, 1), after clipping."""
    low = low if factors.clip_low is None else low * factors.clip_low
    high = high if factors.clip_high is None else high * factors.clip_high
    return how.format.range(low, high, how.floor, how.scale_dtype, how.global_scale)


def place_on_grid(y: Tensor, found: Range, factors: Factors, how: Rounding) -> Tensor:
    """Where `y` falls on the grid, before clamping and rounding."""
    q = y / found.scale
    if found.zero is not None:
        q = q + found.zero
    if factors.offset is None:
        return q
    offset, spacing = grouped(factors.offset, how.format.group_size), how.format.elements.spacing(q)
    return q + (offset if spacing is None else offset * spacing)


def stored_scale(found: Range, factors: Factors, how: Rounding) -> Tensor:
    """The scale that the checkpoint holds: s·r, rounded to the precision it is stored in."""
    if factors.gain is None:
        return found.scale
    return how.format.scales.stored(found.scale * factors.gain, how.scale_dtype, how.global_scale)


def quantize_rows(x: Tensor, factors: Factors, how: Rounding) -> tuple[Tensor, Tensor, Tensor]:
    """(x̂ (rows, width), minima, maxima (rows, groups, 1)); the extremes are what the backward needs."""
    format = how.format
    y = scaled(x, factors, format.group_size)
    low, high = extremes(y)
    found = range_of(low, high, factors, how)
    q = format.elements.nearest(place_on_grid(y, found, factors, how).clamp(format.low, format.high))
    if found.zero is not None:
        q = q - found.zero
    product = (q * stored_scale(found, factors, how)).flatten(-2)
    if how.product_dtype is not None:
        product = product.to(how.product_dtype)
    return product.to(how.out_dtype or x.dtype), low, high


def gradients_of_rows(
    x: Tensor,  # (rows, width)
    factors: Factors,
    low: Tensor,  # (rows, groups, 1)
    high: Tensor,
    grad: Tensor,  # (rows, width), the gradient of x̂
    how: Rounding,
    wanted: Sequence[bool],  # of x and the factors in their order
) -> Gradients:
    """See the file's formulas. What is not asked for costs nothing."""
    row, column, clip_low, clip_high, gain, _ = factors
    wants_x, wants_row, wants_column, wants_low, wants_high, wants_gain, wants_offset = wanted
    format = how.format
    y = scaled(x, factors, format.group_size)
    found = range_of(low, high, factors, how)
    place = place_on_grid(y, found, factors, how)
    clamped = place.clamp(format.low, format.high)
    grad = grouped(grad.to(y.dtype), format.group_size)
    grad_inside = torch.where(place == clamped, grad, torch.zeros_like(grad))
    steps = format.elements.nearest(clamped)
    steps = steps if found.zero is None else steps - found.zero

    # Sums along each group, of the gradient before the factor r.
    with_steps = (grad * steps).sum(-1, keepdim=True)
    with_values = (grad_inside * y).sum(-1, keepdim=True)
    outside = (grad - grad_inside).sum(-1, keepdim=True)
    grad_gain = None
    if gain is not None:
        if wants_gain:
            grad_gain = (with_steps * found.scale).sum_to_size(gain.shape)
        # x̂ moves with the stored scale over s, which is r but for rounding; the stored scale itself moves with r.
        rounded_gain = stored_scale(found, factors, how) / found.scale
        with_steps, with_values, outside = with_steps * gain, with_values * rounded_gain, outside * rounded_gain

    grad_scale = with_steps - with_values / found.scale
    end_low = low if clip_low is None else low * clip_low
    end_high = high if clip_high is None else high * clip_high
    if found.zero_open is None:  # symmetric
        grad_scale = grad_scale * found.scale_open / (format.steps / 2)
        lower_leads = -end_low >= end_high
        grad_low, grad_high = -grad_scale * lower_leads, grad_scale * ~lower_leads
    else:
        zero_moves = outside * found.zero_open
        grad_scale = (grad_scale - zero_moves * end_low / found.scale) * found.scale_open / format.steps
        grad_low, grad_high = zero_moves - grad_scale, grad_scale
    grad_clip_low = grad_low * low if wants_low else None
    grad_clip_high = grad_high * high if wants_high else None
    to_low = (grad_low if clip_low is None else grad_low * clip_low) * (low < 0)
    to_high = (grad_high if clip_high is None else grad_high * clip_high) * (high > 0)

    grad_row = None
    if wants_row:
        assert row is not None
        grad_row = (with_values + to_low * low + to_high * high).sum((1, 2)) / row
    inside = grad_inside if gain is None else grad_inside * rounded_gain
    grad_offset = None
    if wants_offset:
        spacing = format.elements.spacing(y / found.scale)
        grad_offset = (inside * found.scale if spacing is None else inside * found.scale * spacing).flatten(-2)
    grad_x = grad_column = None
    if wants_x or wants_column:
        at_low, at_high = (y == low).to(y.dtype), (y == high).to(y.dtype)
        share_low = to_low / at_low.sum(-1, keepdim=True).clamp(min=1)
        share_high = to_high / at_high.sum(-1, keepdim=True).clamp(min=1)
        grad_y = (inside + share_low * at_low + share_high * at_high).flatten(-2)
        if row is not None:
            grad_y = grad_y * row[:, None]
        if wants_column:
            grad_column = (grad_y * x).sum(0)
        if wants_x:
            grad_x = (grad_y if column is None else grad_y * column).to(x.dtype)
    return Gradients(grad_x, grad_row, grad_column, grad_clip_low, grad_clip_high, grad_gain, grad_offset)
