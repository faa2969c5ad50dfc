"""What becomes a linear: experts and Conv1D are views of the same memory, routers and gates are left."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrquant.architectures.experts import is_fused, seeing_everything
from lrquant.architectures.targets import experts_alike, expose_linears, linears_of, mixtures_of, watched_inputs
from tests import mixtures

IDS = torch.arange(5, 45)[None]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def storages(module: nn.Module) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}


@pytest.mark.parametrize("name", [*mixtures.MIXTURES, "gpt2"])
def test_linears_are_views_that_leave_the_function_as_it_is(name: str) -> None:
    model = mixtures.build(name).double()
    if name in mixtures.MIXTURES:
        model.set_experts_implementation("eager")  # grouped products take no double precision
    before, memory = logits(model), storages(model)
    expose_linears(model)
    # The same products, which BLAS may add up in another order.
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-12)
    assert storages(model) <= memory  # nothing is copied
    assert not any(is_fused(module) for module in model.modules())
    blocks = model.transformer.h if name == "gpt2" else model.model.layers
    for block in blocks:
        quantized = sum(linear.weight.numel() for linear in linears_of(block).values())
        assert quantized > 0.95 * sum(parameter.numel() for parameter in block.parameters())
    expose_linears(model)  # again changes nothing
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", list(mixtures.MIXTURES))
def test_routers_and_gates_are_no_targets(name: str) -> None:
    model = mixtures.build(name)
    expose_linears(model)
    block = model.model.layers[-1]
    (mixture,) = mixtures_of(block)
    assert len(mixture.experts) == 4
    linears = linears_of(block)
    assert not set(mixture.gates) & linears.keys()
    assert all(linear.out_features not in (1, 4) for linear in linears.values())
    alike = experts_alike(block)
    assert {names[2].removeprefix(f"{mixture.path}.2.") for names in alike} == {"gate_proj", "up_proj", "down_proj"}
    assert all(len(names) == 4 for names in alike)
    expected = {"qwen2_moe": "mlp.shared_expert_gate", "llama4": "feed_forward.router", "phimoe": "mlp.router"}
    assert mixture.gates == ((expected[name],) if name in expected else ())  # other routers are no linears


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_may_see_every_token_without_a_change_of_the_output(name: str) -> None:
    model = mixtures.build(name)
    expose_linears(model)
    block = model.model.layers[0]
    rows: dict[str, int] = {}

    def seen(linear: str, x: Tensor) -> None:
        rows[linear] = len(x) if ".experts." in linear else 0

    with watched_inputs(linears_of(block), seen):
        before = logits(model)
        assert sum(count for linear, count in rows.items() if linear.endswith("down_proj")) == 2 * IDS.numel()
        with seeing_everything(block):
            assert torch.allclose(logits(model), before, atol=1e-6)
        assert all(count in (0, IDS.numel()) for count in rows.values())
        assert torch.equal(logits(model), before)
