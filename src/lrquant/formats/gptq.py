"""GPTQ: weights that are not rounded yet compensate the error of each rounded weight.

For a linear with inputs X (tokens, in) and H = XᵀX, the rounding of column j in the order of falling H[j, j] moves the
columns after it by −(e_j / U[j, j])·U[j, j:], where e_j is column j's error and UᵀU = H⁻¹, U upper triangular (Frantar
et al., GPTQ, §3, algorithm 1). Scales and zero points do not change, so groups need no particular order.

The result is expressed as offsets v = Δw/s, the change of a weight in units of its scale, so that round(clamp(w/s + z +
v)) are GPTQ's integers. They use the same code as learned offsets, and learning can start from them.
"""

import torch
from torch import Tensor

from lrquant.formats.fake_quant_math import Factors, Rounding, extremes, range_of, scaled
from lrquant.formats.number_format import NumberFormat
from lrquant.formats.qparams import WEIGHT_SCALE_FLOOR

DAMPING = 0.01  # of the mean of H's diagonal, added to the diagonal
BLOCK = 128  # columns whose compensation is applied to the rest at once
MOST_DAMPING = 1e3


@torch.no_grad()
def compensating_offsets(
    weight: Tensor,  # (out, in)
    hessian: Tensor,  # (in, in), XᵀX of the inputs to the transformed weight
    format: NumberFormat,
    factors: Factors = Factors(),  # noqa: B008 - an immutable tuple
    scale_dtype: torch.dtype | None = None,
    global_scale: Tensor | None = None,  # (1,)
) -> Tensor:
    """Offsets (out, in) with which the weight rounds to GPTQ's integers, in float32.

    `factors` without offsets. A column whose inputs are all zero gets the offset zero and passes nothing on.
    """
    how = Rounding(format, WEIGHT_SCALE_FLOOR, scale_dtype, global_scale=global_scale)
    y = scaled(weight, factors, format.group_size)
    found = range_of(*extremes(y), factors, how)
    rows, width = weight.shape
    scale = found.scale.expand_as(y).reshape(rows, width)
    zero = torch.zeros_like(scale) if found.zero is None else found.zero.expand_as(y).reshape(rows, width)
    original = y.reshape(rows, width)

    dead = hessian.diagonal() == 0
    order = hessian.diagonal().argsort(descending=True, stable=True)
    upper = _inverse_factor(hessian[order][:, order], dead[order]).to(weight.dtype)
    moved, scale, zero = original[:, order], scale[:, order], zero[:, order]
    for begin in range(0, width, BLOCK):
        end = min(begin + BLOCK, width)
        errors = moved.new_empty(rows, end - begin)
        for j in range(begin, end):
            value, s, z = moved[:, j], scale[:, j], zero[:, j]
            rounded = (format.elements.nearest((value / s + z).clamp(format.low, format.high)) - z) * s
            errors[:, j - begin] = (value - rounded) / upper[j, j]
            moved[:, j + 1 : end].addr_(errors[:, j - begin], upper[j, j + 1 : end], alpha=-1)
        moved[:, end:].addmm_(errors, upper[begin:end, end:], alpha=-1)
    offsets = torch.empty_like(original)
    offsets[:, order] = (moved - original[:, order]) / scale
    spacing = format.elements.spacing(y.reshape(rows, width) / found.scale.expand_as(y).reshape(rows, width))
    offsets = offsets if spacing is None else offsets / spacing
    offsets[:, dead] = 0
    return offsets


def _inverse_factor(hessian: Tensor, dead: Tensor) -> Tensor:
    """Upper triangular U with UᵀU = (H + λI)⁻¹, in float64; λ grows tenfold until H can be factored."""
    h = hessian.double()
    h.diagonal()[dead] = 1
    mean = float(h.diagonal().mean())
    damping = DAMPING
    while damping <= MOST_DAMPING:
        damped = h.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping *= 10
    raise ValueError("the inputs' second moments are not positive definite, even with damping")
