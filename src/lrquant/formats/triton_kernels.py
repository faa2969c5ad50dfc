"""The arithmetic of `lrquant.formats.fake_quant_math` for CUDA, one Triton kernel for each direction.

A program holds some rows of one group in registers: it reads a weight once and writes its result once. Backward,
every sum along a row is complete within a program; the sums along columns are kept per strip of rows and added up
afterwards in a fixed order, so that the same input gives the same bits.

Every operation rounds as PyTorch's does: to the values' own precision after each step, division correctly
rounded, no fused multiply-add. x̂ is therefore PyTorch's, bit for bit.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrquant.formats.fake_quant_math import Factors, Gradients, Rounding

_VALUES = 4096  # of a group, or of several rows' groups, that a program holds at once
_LEAST_STRIPS = 512  # programs that a card wants to be busy, at least
_ROUND = tl.constexpr(12582912.0)  # 1.5·2²³: adding and subtracting it rounds to whole numbers, half to even

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _to(x, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """`x` rounded to TYPE, in float32."""
    return x.to(TYPE).to(tl.float32)


@triton.jit
def _whole(x):  # type: ignore[no-untyped-def]
    return (x + _ROUND) - _ROUND


@triton.jit
def _factor(pointer, index, mask, HAS: tl.constexpr):  # type: ignore[no-untyped-def]
    if HAS:
        return tl.load(pointer + index, mask=mask, other=1.0).to(tl.float32)
    else:  # noqa: RET505 - Triton drops a branch, not what follows it
        return 1.0


@triton.jit
def _range(  # type: ignore[no-untyped-def]
    end_low, end_high, LOW, HIGH, STEPS, FLOOR, HAS_FLOOR: tl.constexpr, SYMMETRIC: tl.constexpr,
    VALUE: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Scale, zero point, and whether their clamps are open: as Symmetric and Affine of qparams.py."""
    if SYMMETRIC:
        scale = _to(tl.div_rn(tl.maximum(-end_low, end_high), STEPS / 2), VALUE)
    else:
        scale = _to(tl.div_rn(_to(end_high - end_low, VALUE), STEPS), VALUE)
    scale = _to(_to(scale, SCALE), VALUE)
    if HAS_FLOOR:
        scale_open = scale >= FLOOR
    else:
        scale_open = scale != 0
    scale = tl.where(scale_open, scale, _to(scale * 0 + FLOOR, VALUE))
    scale = _to(_to(scale, SCALE), VALUE)
    if SYMMETRIC:
        zero = scale * 0
        zero_open = zero != 0
    else:
        zero = _to(LOW - _to(tl.div_rn(end_low, scale), VALUE), VALUE)
        zero_open = (zero >= LOW) & (zero <= HIGH)
        zero = _whole(tl.minimum(tl.maximum(zero, LOW), HIGH))
    return scale, zero, scale_open, zero_open


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x_pointer, row_pointer, column_pointer, clip_low_pointer, clip_high_pointer, gain_pointer, offset_pointer,
    out_pointer, low_pointer, high_pointer,
    rows, width, groups, gain_groups, LOW, HIGH, STEPS, FLOOR,
    G: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    HAS_ROW: tl.constexpr, HAS_COLUMN: tl.constexpr, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr,
    HAS_GAIN: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_FLOOR: tl.constexpr, SYMMETRIC: tl.constexpr,
    VALUE: tl.constexpr, SCALE: tl.constexpr, PRODUCT: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)
    row_mask, lane_mask = row < rows, lane < G
    mask = row_mask[:, None] & lane_mask[None, :]
    column = group * G + lane
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    small = row * groups + group

    y = tl.load(x_pointer + place, mask=mask, other=0.0).to(tl.float32)
    if HAS_ROW:
        y = _to(y * _factor(row_pointer, row, row_mask, True)[:, None], VALUE)
    if HAS_COLUMN:
        y = _to(y * _factor(column_pointer, column, lane_mask, True)[None, :], VALUE)
    low = tl.minimum(tl.min(y, axis=1), 0.0)
    high = tl.maximum(tl.max(y, axis=1), 0.0)
    tl.store(low_pointer + small, low, mask=row_mask)
    tl.store(high_pointer + small, high, mask=row_mask)
    end_low = _to(low * _factor(clip_low_pointer, small, row_mask, HAS_LOW), VALUE)
    end_high = _to(high * _factor(clip_high_pointer, small, row_mask, HAS_HIGH), VALUE)
    scale, zero, _, _ = _range(end_low, end_high, LOW, HIGH, STEPS, FLOOR, HAS_FLOOR, SYMMETRIC, VALUE, SCALE)
    q = _to(tl.div_rn(y, tl.broadcast_to(scale[:, None], (ROWS, BLOCK))), VALUE)
    if not SYMMETRIC:
        q = _to(q + zero[:, None], VALUE)
    if HAS_OFFSET:
        q = _to(q + tl.load(offset_pointer + place, mask=mask, other=0.0).to(tl.float32), VALUE)
    q = _whole(tl.minimum(tl.maximum(q, LOW), HIGH)) - zero[:, None]
    if HAS_GAIN:
        gain = _factor(gain_pointer, row * gain_groups + group % gain_groups, row_mask, True)
        scale = _to(_to(_to(scale * gain, VALUE), SCALE), VALUE)
    product = _to(_to(q * scale[:, None], VALUE), PRODUCT)
    tl.store(out_pointer + place, product.to(OUT), mask=mask)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    x_pointer, row_pointer, column_pointer, clip_low_pointer, clip_high_pointer, gain_pointer, offset_pointer,
    low_pointer, high_pointer, grad_pointer,
    grad_x_pointer, grad_row_pointer, grad_column_pointer, grad_low_pointer, grad_high_pointer, grad_gain_pointer,
    grad_offset_pointer,
    rows, width, groups, gain_groups, strip, LOW, HIGH, STEPS, FLOOR,
    G: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    HAS_ROW: tl.constexpr, HAS_COLUMN: tl.constexpr, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr,
    HAS_GAIN: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_FLOOR: tl.constexpr, SYMMETRIC: tl.constexpr,
    VALUE: tl.constexpr, SCALE: tl.constexpr,
    WANTS_X: tl.constexpr, WANTS_ROW: tl.constexpr, WANTS_COLUMN: tl.constexpr, WANTS_LOW: tl.constexpr,
    WANTS_HIGH: tl.constexpr, WANTS_GAIN: tl.constexpr, WANTS_OFFSET: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    lane_mask = lane < G
    column = group * G + lane
    column_factor = _factor(column_pointer, column, lane_mask, HAS_COLUMN)
    column_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, strip, ROWS):
        row = tl.program_id(0) * strip + start + tl.arange(0, ROWS)
        row_mask = row < rows
        mask = row_mask[:, None] & lane_mask[None, :]
        place = row.to(tl.int64)[:, None] * width + column[None, :]
        small = row * groups + group

        x = tl.load(x_pointer + place, mask=mask, other=0.0).to(tl.float32)
        y = x
        if HAS_ROW:
            row_factor = _factor(row_pointer, row, row_mask, True)
            y = _to(y * row_factor[:, None], VALUE)
        if HAS_COLUMN:
            y = _to(y * column_factor[None, :], VALUE)
        low = tl.load(low_pointer + small, mask=row_mask, other=0.0).to(tl.float32)
        high = tl.load(high_pointer + small, mask=row_mask, other=0.0).to(tl.float32)
        clip_low = _factor(clip_low_pointer, small, row_mask, HAS_LOW)
        clip_high = _factor(clip_high_pointer, small, row_mask, HAS_HIGH)
        end_low, end_high = _to(low * clip_low, VALUE), _to(high * clip_high, VALUE)
        scale, zero, scale_open, zero_open = _range(
            end_low, end_high, LOW, HIGH, STEPS, FLOOR, HAS_FLOOR, SYMMETRIC, VALUE, SCALE
        )
        q = _to(tl.div_rn(y, tl.broadcast_to(scale[:, None], (ROWS, BLOCK))), VALUE)
        if not SYMMETRIC:
            q = _to(q + zero[:, None], VALUE)
        if HAS_OFFSET:
            q = _to(q + tl.load(offset_pointer + place, mask=mask, other=0.0).to(tl.float32), VALUE)
        clamped = tl.minimum(tl.maximum(q, LOW), HIGH)
        grad = tl.load(grad_pointer + place, mask=mask, other=0.0).to(tl.float32)
        inside = tl.where(q == clamped, grad, 0.0)
        steps = _whole(clamped) - zero[:, None]

        with_steps = tl.sum(grad * steps, axis=1)
        with_values = tl.sum(inside * y, axis=1)
        outside = tl.sum(grad - inside, axis=1)
        if HAS_GAIN:
            gain = _factor(gain_pointer, row * gain_groups + group % gain_groups, row_mask, True)
            if WANTS_GAIN:
                tl.store(grad_gain_pointer + small, with_steps * scale, mask=row_mask)
            rounded_gain = tl.div_rn(_to(_to(_to(scale * gain, VALUE), SCALE), VALUE), scale)
            with_steps *= gain
            with_values *= rounded_gain
            outside *= rounded_gain
            inside *= rounded_gain[:, None]
        grad_scale = with_steps - with_values / scale
        if SYMMETRIC:
            grad_scale = tl.where(scale_open, grad_scale / (STEPS / 2), 0.0)
            lower_leads = -end_low >= end_high
            grad_low = tl.where(lower_leads, -grad_scale, 0.0)
            grad_high = tl.where(lower_leads, 0.0, grad_scale)
        else:
            zero_moves = tl.where(zero_open, outside, 0.0)
            grad_scale = tl.where(scale_open, (grad_scale - zero_moves * end_low / scale) / STEPS, 0.0)
            grad_low, grad_high = zero_moves - grad_scale, grad_scale
        if WANTS_LOW:
            tl.store(grad_low_pointer + small, grad_low * low, mask=row_mask)
        if WANTS_HIGH:
            tl.store(grad_high_pointer + small, grad_high * high, mask=row_mask)
        to_low = tl.where(low < 0, grad_low * clip_low, 0.0)
        to_high = tl.where(high > 0, grad_high * clip_high, 0.0)
        if WANTS_ROW:
            tl.store(grad_row_pointer + small, with_values + to_low * low + to_high * high, mask=row_mask)
        if WANTS_OFFSET:
            tl.store(grad_offset_pointer + place, inside * scale[:, None], mask=mask)
        if WANTS_X or WANTS_COLUMN:
            at_low = ((y == low[:, None]) & mask).to(tl.float32)
            at_high = ((y == high[:, None]) & mask).to(tl.float32)
            share_low = to_low / tl.maximum(tl.sum(at_low, axis=1), 1.0)
            share_high = to_high / tl.maximum(tl.sum(at_high, axis=1), 1.0)
            grad_y = inside + share_low[:, None] * at_low + share_high[:, None] * at_high
            if HAS_ROW:
                grad_y *= row_factor[:, None]
            if WANTS_COLUMN:
                column_sum += tl.sum(grad_y * x, axis=0)
            if WANTS_X:
                if HAS_COLUMN:
                    grad_y *= column_factor[None, :]
                tl.store(grad_x_pointer + place, grad_y, mask=mask)
    if WANTS_COLUMN:
        tl.store(grad_column_pointer + tl.program_id(0) * width + column, column_sum, mask=lane_mask)


def _settings(x: Tensor, factors: Factors, how: Rounding) -> dict[str, Any]:
    """What both kernels are told of the format and the factors."""
    rows, width = x.shape
    format = how.format
    size = format.group_size or width
    block = triton.next_power_of_2(size)
    floor = how.floor if how.floor is not None else torch.finfo(x.dtype).eps
    return {
        "rows": rows,
        "width": width,
        "groups": width // size,
        "gain_groups": 1 if factors.gain is None else factors.gain.shape[1],
        "LOW": float(format.low),
        "HIGH": float(format.high),
        "STEPS": float(format.steps),
        "FLOOR": float(torch.tensor(floor, dtype=x.dtype)),
        "G": size,
        "BLOCK": block,
        "ROWS": min(max(1, _VALUES // block), triton.next_power_of_2(rows)),
        "HAS_ROW": factors.row is not None,
        "HAS_COLUMN": factors.column is not None,
        "HAS_LOW": factors.clip_low is not None,
        "HAS_HIGH": factors.clip_high is not None,
        "HAS_GAIN": factors.gain is not None,
        "HAS_OFFSET": factors.offset is not None,
        "HAS_FLOOR": how.floor is not None,
        "SYMMETRIC": format.symmetric,
        "VALUE": _TYPES[x.dtype],
        "SCALE": _TYPES[how.scale_dtype or x.dtype],
        "num_warps": min(16, max(4, block // 1024)),
        "enable_fp_fusion": False,
    }


def _pointers(x: Tensor, factors: Factors) -> list[Tensor]:
    """Every factor as a dense tensor; `x` stands in for those that are not there and not read."""
    return [x, *(x if factor is None else factor.contiguous() for factor in factors)]


def quantize_rows(x: Tensor, factors: Factors, how: Rounding) -> tuple[Tensor, Tensor, Tensor]:
    """As `rows.quantize_rows`."""
    settings = _settings(x, factors, how)
    out = torch.empty_like(x, dtype=how.out_dtype or x.dtype)
    low, high = (x.new_empty(settings["rows"], settings["groups"], 1) for _ in range(2))
    programs = (triton.cdiv(settings["rows"], settings["ROWS"]), settings["groups"])
    _forward[programs](
        *_pointers(x.contiguous(), factors),
        out,
        low,
        high,
        **settings,
        PRODUCT=_TYPES[how.product_dtype or x.dtype],
        OUT=_TYPES[out.dtype],
    )
    return out, low, high


def gradients_of_rows(
    x: Tensor, factors: Factors, low: Tensor, high: Tensor, grad: Tensor, how: Rounding, wanted: Sequence[bool]
) -> Gradients:
    """As `rows.gradients_of_rows`."""
    settings = _settings(x, factors, how)
    rows, width, groups = settings["rows"], settings["width"], settings["groups"]
    wants = dict(zip(Gradients._fields, wanted, strict=True))
    # Sums along columns are kept per strip: long strips keep them few, short ones keep every processor busy.
    strip = settings["ROWS"]
    if wants["column"]:
        strip *= max(1, min(64, rows * groups // (strip * _LEAST_STRIPS)))
    strips = triton.cdiv(rows, strip)
    sums = {name: x.new_empty(rows, groups, 1) for name in ("row", "clip_low", "clip_high", "gain") if wants[name]}
    column = x.new_empty(strips, width) if wants["column"] else None
    grad_x, grad_offset = (torch.empty_like(x) if wants[name] else None for name in ("x", "offset"))
    results = [grad_x, sums.get("row"), column, *(sums.get(name) for name in ("clip_low", "clip_high", "gain"))]
    _backward[(strips, groups)](
        *_pointers(x.contiguous(), factors),
        low,
        high,
        grad.contiguous(),
        *(x if result is None else result for result in (*results, grad_offset)),
        **settings,
        strip=strip,
        WANTS_X=wants["x"],
        WANTS_ROW=wants["row"],
        WANTS_COLUMN=wants["column"],
        WANTS_LOW=wants["clip_low"],
        WANTS_HIGH=wants["clip_high"],
        WANTS_GAIN=wants["gain"],
        WANTS_OFFSET=wants["offset"],
    )
    return Gradients(
        grad_x,
        sums["row"].sum((1, 2)) / factors.row if wants["row"] and factors.row is not None else None,
        None if column is None else column.sum(0),
        sums.get("clip_low"),
        sums.get("clip_high"),
        sums["gain"].sum_to_size(factors.gain.shape) if wants["gain"] and factors.gain is not None else None,
        grad_offset,
    )
