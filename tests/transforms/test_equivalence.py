"""Reparameterisation is a pure function, and biases are added where a shift needs them."""

import torch
from torch import nn

from lrquant.transforms import NormToLinears, materialize, reparameterize
from lrquant.transforms.bias_slots import add_bias_slots, missing_biases

PAIR = NormToLinears("norm", ("linear",))


def params() -> dict[str, torch.Tensor]:
    return {
        "norm.weight": torch.tensor([2.0, 1.0]),
        "norm.bias": torch.tensor([0.0, 3.0]),
        "linear.weight": torch.tensor([[1.0, -1.0], [2.0, 0.5]]),
        "linear.bias": torch.tensor([1.0, 0.0]),
    }


def test_norm_to_linear_by_hand() -> None:
    learnables = {f"{PAIR.name}.scale": torch.tensor([2.0, 4.0]), f"{PAIR.name}.shift": torch.tensor([1.0, -1.0])}
    before = params()
    after = materialize(before, reparameterize(before, [PAIR], learnables))
    assert after["norm.weight"].tolist() == [1.0, 0.25]  # weight/S
    assert after["norm.bias"].tolist() == [-0.5, 1.0]  # (bias − δ)/S
    assert after["linear.weight"].tolist() == [[2.0, -4.0], [4.0, 2.0]]  # W·diag(S)
    assert after["linear.bias"].tolist() == [3.0, 1.5]  # b + W δ
    for name, tensor in params().items():
        torch.testing.assert_close(before[name], tensor, rtol=0, atol=0)


def test_norms_that_multiply_by_one_plus_weight() -> None:
    pair = NormToLinears("norm", ("linear",), offset=1.0)
    learnables = {f"{pair.name}.scale": torch.tensor([2.0, 4.0])}
    after = materialize(params(), reparameterize(params(), [pair], learnables))
    assert after["norm.weight"].tolist() == [0.5, -0.5]  # (1 + w)/S − 1


def test_without_learnables_nothing_changes() -> None:
    changed = reparameterize(params(), [PAIR], {})
    assert not changed.row
    assert not changed.column
    assert not changed.vectors


def test_gradients_reach_scales_and_shifts() -> None:
    learnables = {f"{PAIR.name}.{kind}": torch.full((2,), 1.5, requires_grad=True) for kind in ("scale", "shift")}
    after = materialize(params(), reparameterize(params(), [PAIR], learnables))
    sum(tensor.square().sum() for tensor in after.values()).backward()
    for name, tensor in learnables.items():
        assert tensor.grad is not None, name
        assert (tensor.grad != 0).all(), name


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(3), nn.Linear(3, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x))


def test_bias_slots_are_zero_and_then_work() -> None:
    block, x = Block(), torch.randn(4, 3)
    before = block(x)
    slots = missing_biases(block, ("norm", "linear", "linear"))
    assert slots == ("norm", "linear")
    add_bias_slots(block, slots)
    assert missing_biases(block, slots) == ()
    torch.testing.assert_close(block(x), before, rtol=0, atol=0)
    with torch.no_grad():
        block.norm.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
        block.linear.bias.copy_(torch.tensor([4.0, 5.0]))
        expected = block.linear.weight @ torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([4.0, 5.0])
    torch.testing.assert_close(block(x) - before, expected.expand(4, 2))
