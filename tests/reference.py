"""The mathematics of fake quantization as a plain chain of differentiable operations, to check the fast one by."""

import torch
from torch import Tensor


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the derivative of `x`."""
    return x + (rounded - x).detach()


def fake_quantize_weight(
    weight: Tensor,  # (out, in)
    bits: int,
    symmetric: bool,
    group_size: int | None,
    row: Tensor | None = None,  # (out,)
    column: Tensor | None = None,  # (in,)
    clip_low: Tensor | None = None,  # (out, groups, 1)
    clip_high: Tensor | None = None,  # (out, groups, 1)
    gain: Tensor | None = None,  # (out, 1, 1)
    offset: Tensor | None = None,  # (out, in)
    scale_dtype: torch.dtype = torch.float64,  # what the checkpoint holds
) -> Tensor:
    least, most, steps = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 2**bits - 1
    if row is not None:
        weight = weight * row[:, None]
    if column is not None:
        weight = weight * column
    groups = weight.unflatten(-1, (-1, group_size or weight.shape[-1]))
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    if clip_low is not None:
        low = low * clip_low
    if clip_high is not None:
        high = high * clip_high
    if symmetric:
        scale = torch.maximum(-low, high) / (steps / 2)
    else:
        scale = (high - low) / steps
    scale = straight_through(scale, scale.to(scale_dtype).to(scale.dtype)).clamp(min=1e-5)
    scale = straight_through(scale, scale.to(scale_dtype).to(scale.dtype))
    zero = torch.zeros_like(scale)
    if not symmetric:
        zero = (least - low / scale).clamp(least, most)
        zero = straight_through(zero, zero.round())
    q = groups / scale + zero
    if offset is not None:
        q = q + offset.view_as(groups)
    q = q.clamp(least, most)
    q = straight_through(q, q.round())
    if gain is not None:
        scale = straight_through(scale * gain, (scale * gain).to(scale_dtype).to(scale.dtype))
    return ((q - zero) * scale).flatten(-2)
