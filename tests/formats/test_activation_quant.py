"""Where activations are rounded inside a model, and that nothing stays behind."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrquant.formats import activation_quant as activations
from lrquant.formats import fake_quantize, format_of
from lrquant.formats.activation_quant import quantized_activations, route_attention
from lrquant.formats.schemes import AttentionScheme, activation_args
from tests.models import MODELS, build, token_ids

ARGS = activation_args(4)


@pytest.mark.parametrize("name", MODELS)
def test_routing_attention_alone_changes_nothing(name: str) -> None:
    model, ids = build(name, torch.float32), token_ids(2)
    before = model(input_ids=ids, use_cache=False).logits
    assert route_attention(model) is (not name.startswith("falcon"))  # Falcon calls its attention itself
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, before, rtol=0, atol=0)
    assert route_attention(model) is (not name.startswith("falcon"))  # and again


def test_linears_see_rounded_inputs_within_and_their_own_afterwards() -> None:
    model = build("llama", torch.float32)
    block = model.model.layers[0]
    linears = {module: ARGS for module in block.modules() if isinstance(module, nn.Linear)}
    seen: list[Tensor] = []
    first = block.self_attn.q_proj
    with torch.no_grad():
        block.input_layernorm.register_forward_hook(lambda _, inputs, output: seen.append(output))
        ids = token_ids(1)
        before = model(ids).logits
        with quantized_activations(block, linears, None):
            watch = first.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
            within = model(ids).logits
            watch.remove()
        after = model(ids).logits
    torch.testing.assert_close(seen[2], fake_quantize(seen[1], format_of(ARGS)), rtol=0, atol=0)
    assert not torch.equal(within, before)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "gemma2"])  # SDPA, eager
def test_queries_keys_and_values_are_rounded_per_token_and_head(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name, torch.float32)
    assert route_attention(model)
    seen: list[tuple[Tensor, ...]] = []
    rounding = activations._quantized

    def recorded(module: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
        result = rounding(module, *tensors)
        seen.append((*tensors, *result))
        return result

    monkeypatch.setattr(activations, "_quantized", recorded)
    block: Any = model.model.layers[0]
    ids = token_ids(1)
    with torch.no_grad(), quantized_activations(block, {}, AttentionScheme(ARGS, ARGS)):
        model(ids)
    inside, outside = seen
    for raw, rounded in zip(inside[:3], inside[3:], strict=True):
        torch.testing.assert_close(rounded, fake_quantize(raw, format_of(ARGS)), rtol=0, atol=0)
        assert len(rounded[0, 0, 0].unique()) <= 16  # a token of one head has 4 bits
    for raw, untouched in zip(outside[:3], outside[3:], strict=True):
        assert untouched is raw
    seen.clear()
    with torch.no_grad():
        model(ids)
    assert all(raw is untouched for step in seen for raw, untouched in zip(step[:3], step[3:], strict=True))
