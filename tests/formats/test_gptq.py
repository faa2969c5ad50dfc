"""Compensating offsets against GPTQ written out: one column at a time, the inverse updated by elimination."""

import pytest
import torch
from torch import Tensor

from lrquant.formats import Factors, NumberFormat, quantize_weight
from lrquant.formats.gptq import DAMPING, compensating_offsets
from lrquant.formats.integers import integers


def plain_gptq(weight: Tensor, scale: Tensor, zero: Tensor, format: NumberFormat, hessian: Tensor) -> Tensor:
    """Integers (out, in) by optimal brain surgery: quantize a column, correct the rest, eliminate it from H⁻¹."""
    h = hessian.double() + DAMPING * float(hessian.diagonal().double().mean()) * torch.eye(len(hessian))
    inverse = torch.linalg.inv(h)
    w, q = weight.double().clone(), torch.zeros_like(weight)
    for j in hessian.diagonal().argsort(descending=True, stable=True).tolist():
        q[:, j] = (w[:, j] / scale[:, j] + zero[:, j]).clamp(format.low, format.high).round()
        error = w[:, j] - (q[:, j] - zero[:, j]) * scale[:, j]
        w -= error[:, None] * inverse[j] / inverse[j, j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return q


def problem(rows: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(width, width, generator=generator)
    inputs = torch.randn(4 * width, width, generator=generator) @ mixed
    return torch.randn(rows, width, generator=generator), inputs.T @ inputs


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("width", [64, 192])  # within one block of columns, and over two
def test_the_integers_are_gptqs(group_size: int | None, symmetric: bool, width: int) -> None:
    format = integers(3, symmetric, group_size)
    weight, hessian = problem(24, width)
    factors = Factors(
        row=torch.rand(24) + 0.5,
        column=torch.rand(width) + 0.5,
        clip_high=torch.full((24, width // (group_size or width), 1), 0.9),
    )
    offsets = compensating_offsets(weight, hessian, format, factors)
    got = quantize_weight(weight, format, factors._replace(offset=offsets))
    repeats = width // got.scale.shape[1]
    scale = got.scale.repeat_interleave(repeats, 1)
    zero = torch.zeros_like(scale) if got.zero is None else got.zero.repeat_interleave(repeats, 1).float()
    assert factors.row is not None
    assert factors.column is not None
    expected = plain_gptq(weight * factors.row[:, None] * factors.column, scale, zero, format, hessian)
    # Ties of a last digit may fall either way, and what falls otherwise sends other corrections on in its row.
    rows_alike = (got.codes == expected.to(torch.int8)).all(1).float().mean()
    assert rows_alike > 0.9


def test_the_outputs_error_shrinks() -> None:
    format = integers(2)
    weight, hessian = problem(32, 64)

    def error(offset: Tensor | None) -> float:
        difference = quantize_weight(weight, format, Factors(offset=offset)).dequantized() - weight
        return float(((difference @ hessian) * difference).sum())

    assert error(compensating_offsets(weight, hessian, format)) < 0.6 * error(None)


def test_channels_that_are_always_zero() -> None:
    """They round to the nearest and take nothing on; an input that is all zero leaves the weight as it rounds."""
    weight, hessian = problem(8, 16)
    hessian[3], hessian[:, 3] = 0, 0
    offsets = compensating_offsets(weight, hessian, integers(4))
    assert offsets.isfinite().all()
    assert (offsets[:, 3] == 0).all()
    assert (compensating_offsets(weight, torch.zeros(16, 16), integers(4)) == 0).all()


def test_more_channels_than_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 64, generator=generator)
    assert (
        compensating_offsets(torch.randn(8, 64, generator=generator), inputs.T @ inputs, integers(3)).isfinite().all()
    )
