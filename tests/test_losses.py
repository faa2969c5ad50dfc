"""Losses against values worked out by hand, and at the edges where formulas divide by zero."""

import math

import pytest
import torch

from lrquant.losses import RunningBalance, means, mse, nlc, no_worse, norm_error, objective, terms, value

DOUBLE = torch.float64


def test_mse_by_hand() -> None:
    output = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    assert mse(output, torch.zeros_like(output)).item() == 7.5  # (1 + 4 + 9 + 16)/4


def test_nlc_by_hand() -> None:
    output = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]], dtype=DOUBLE)
    target = torch.tensor([[[1.0, 0.0], [0.0, 5.0]]], dtype=DOUBLE)
    # Cosines 3/5 and 1, mean 0.8. Lengths do not matter, and neither does the sign of the mean.
    assert nlc(output, target).item() == pytest.approx(-math.log(0.8), rel=1e-12)
    assert nlc(output, 7 * target).item() == pytest.approx(-math.log(0.8), rel=1e-12)
    assert nlc(-output, target).item() == pytest.approx(-math.log(0.8), rel=1e-12)


def test_nlc_of_equal_outputs_is_zero() -> None:
    output = torch.randn(2, 5, 8, dtype=DOUBLE)
    assert nlc(output, output).item() == pytest.approx(0.0, abs=1e-12)


def test_orthogonal_outputs_have_the_largest_finite_nlc() -> None:
    output, target = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    assert nlc(output, target).item() == pytest.approx(-math.log(1e-8), rel=1e-6)


@pytest.mark.parametrize("loss", [mse, nlc, norm_error])
@pytest.mark.parametrize("zero", ["one token", "every token", "targets too"])
def test_zero_outputs_have_finite_losses_and_gradients(loss, zero) -> None:
    output, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    output[:1, : 1 if zero == "one token" else None] = 0
    if zero != "one token":
        output.zero_()
    if zero == "targets too":
        target.zero_()
    output.requires_grad_()
    value = loss(output, target)
    value.backward()
    assert value.isfinite()
    assert output.grad.isfinite().all()


def test_mse_does_not_depend_on_how_samples_are_batched() -> None:
    output, target = torch.randn(2, 6, 5, 8, dtype=DOUBLE)
    halves = [mse(output[:3], target[:3]), mse(output[3:], target[3:])]
    torch.testing.assert_close(torch.stack(halves).mean(), mse(output, target))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [mse, nlc, norm_error])
def test_half_precision_is_summed_in_float32(loss, dtype) -> None:
    # Squares of 300 leave float16's range (65504); sums over a thousand of them lose bfloat16's 8 bits.
    output = (300 + torch.randn(1, 4, 1024)).to(dtype)
    target = torch.full_like(output, 295)
    torch.testing.assert_close(loss(output, target), loss(output.float(), target.float()), rtol=1e-6, atol=1e-7)


def test_running_balance_by_hand() -> None:
    balance = RunningBalance()
    first, second = torch.tensor(2.0, dtype=DOUBLE, requires_grad=True), torch.tensor(4.0, dtype=DOUBLE)
    # Averages from 1 with momentum 0.95: 0.95 + 0.05·2 = 1.05 and 0.95 + 0.05·4 = 1.15.
    total = balance(first, second)
    assert total.item() == pytest.approx(2 / (1.05 + 1e-6) + 4 / (1.15 + 1e-6), rel=1e-12)
    total.backward()
    assert first.grad.item() == pytest.approx(1 / (1.05 + 1e-6), rel=1e-12)  # none through the average
    # Then with 1 and 1: 0.95·1.05 + 0.05 = 1.0475 and 0.95·1.15 + 0.05 = 1.1425.
    one = torch.tensor(1.0, dtype=DOUBLE)
    assert balance(one, one).item() == pytest.approx(1 / (1.0475 + 1e-6) + 1 / (1.1425 + 1e-6), rel=1e-12)


def test_running_balance_refuses_another_number_of_terms() -> None:
    balance = RunningBalance()
    balance(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match="zip"):
        balance(torch.tensor(1.0))


def test_norm_error_by_hand() -> None:
    output = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]], dtype=DOUBLE)
    target = torch.tensor([[[0.0, 4.0], [0.0, 5.0]]], dtype=DOUBLE)
    # Squared errors 9 and 9 over norms 4 and 5.
    assert norm_error(output, target).item() == pytest.approx((9 / 4 + 9 / 5) / 2, rel=1e-12)


def test_balanced_is_a_geometric_mean_whose_gradient_weighs_relative_changes_alike() -> None:
    error, direction = torch.tensor(400.0, requires_grad=True), torch.tensor(0.01, requires_grad=True)
    assert value([error, direction], "balanced").item() == pytest.approx(2.0)  # √(400 · 0.01)
    objective([error, direction], "balanced").backward()
    assert (error.grad * error).item() == pytest.approx(0.5)
    assert (direction.grad * direction).item() == pytest.approx(0.5)


def test_balanced_has_finite_gradients_without_any_error() -> None:
    output = torch.randn(1, 3, 4, requires_grad=True)
    parts = [part for part in terms(means(output, [output.detach()], "balanced")) if part is not None]
    objective(parts, "balanced").backward()
    assert output.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["mse", "mse+nlc"])
def test_other_losses_are_minimised_as_they_are_reported(kind) -> None:
    parts = [part for part in terms(means(torch.randn(2, 3, 4), [torch.randn(2, 3, 4)], kind)) if part is not None]
    assert objective(parts, kind).item() == value(parts, kind).item() == pytest.approx(sum(float(p) for p in parts))


def test_balanced_sees_every_token_beside_one_that_drowns_their_squared_error() -> None:
    # One token of norm 25 000 with a hundredth of error has an MSE that the others hardly change.
    torch.manual_seed(0)
    target = torch.randn(1, 256, 64)
    target[0, 0, 5] = 25_000
    noise = 0.3 * torch.randn_like(target)
    noise[0, 0] = 0
    noise[0, 0, 5] = 250

    def measured(output: torch.Tensor, kind: str) -> float:
        parts = [part for part in terms(means(output, [target], kind)) if part is not None]
        return value(parts, kind).item()

    better = 0.5 * noise
    better[0, 0] = noise[0, 0]
    assert measured(target + better, "balanced") < 0.6 * measured(target + noise, "balanced")
    assert measured(target + better, "mse+nlc") > 0.8 * measured(target + noise, "mse+nlc")


def test_no_worse_weighs_terms_by_what_they_were() -> None:
    assert no_worse([1.0], [1.0])
    assert not no_worse([1.1], [1.0])
    assert no_worse([152.7, 0.01], [151.3, 0.02])  # an error 1 % larger, half the angle
    assert not no_worse([150.0, 0.03], [151.3, 0.02])
    assert not no_worse([math.nan, 0.01], [1.0, 0.02])
    assert no_worse([0.0, 0.0], [0.0, 0.0])
