"""Captured inputs and arguments reproduce the model, block by block."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrquant.architectures import family_of
from lrquant.calibration import BlockInputs, capture
from tests.models import MODELS, build, token_ids

IDS = token_ids(3)
CPU = torch.device("cpu")


def captured(model: Any, samples: list[Tensor]) -> tuple[list[nn.Module], BlockInputs]:
    blocks = list(model.get_submodule(family_of(model).blocks))
    return blocks, capture(model, blocks, [{"input_ids": ids} for ids in samples])


@torch.no_grad()
def by_hand(blocks: list[nn.Module], inputs: BlockInputs, samples: list[int]) -> Tensor:
    """Hidden states behind the last block, from what was captured."""
    hidden = torch.cat([inputs.hidden[sample] for sample in samples])
    for index, block in enumerate(blocks):
        output = block(hidden, **inputs.arguments_of(index, samples[0], len(samples), device=CPU))
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


@torch.no_grad()
def models_own(model: Any, blocks: list[nn.Module], ids: Tensor) -> Tensor:
    """Hidden states that the model passes on from its last block."""
    seen: list[Any] = []
    handle = blocks[-1].register_forward_hook(lambda _, inputs, output: seen.append(output))
    model(input_ids=ids)
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


@pytest.mark.parametrize("name", MODELS)
def test_blocks_run_by_hand_give_the_models_hidden_states(name: str) -> None:
    model = build(name, torch.float32)
    blocks, inputs = captured(model, list(IDS.split(1)))
    for sample, ids in enumerate(IDS.split(1)):
        torch.testing.assert_close(
            by_hand(blocks, inputs, [sample]), models_own(model, blocks, ids), rtol=0, atol=0, msg=f"sample {sample}"
        )
    assert inputs.shared()
    together = by_hand(blocks, inputs, [0, 1, 2])
    # Rounding only: one matrix product over three samples adds up in another order than three products.
    torch.testing.assert_close(together, models_own(model, blocks, IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_capturing_leaves_the_model_as_it_was(name: str) -> None:
    model = build(name, torch.float32)
    before = model(IDS).logits
    blocks, inputs = captured(model, [IDS[:1]])
    assert all("forward" not in vars(block) for block in blocks)
    torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=0)
    assert not any("cache" in type(value).__name__.lower() for value in inputs.arguments[0][0].values())


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon-alibi"])
def test_samples_of_different_lengths_keep_their_own_arguments(name: str) -> None:
    model = build(name, torch.float32)
    samples = [token_ids(1, tokens, seed=tokens) for tokens in (9, 9, 5, 9, 7)]
    blocks, inputs = captured(model, samples)
    assert not inputs.shared()
    for sample, ids in enumerate(samples):
        torch.testing.assert_close(
            by_hand(blocks, inputs, [sample]), models_own(model, blocks, ids), rtol=0, atol=0, msg=f"sample {sample}"
        )


def test_layers_with_windows_get_another_mask_than_full_ones() -> None:
    model = build("gemma3", torch.float32)
    _, inputs = captured(model, [IDS[:1]])
    local, everything = (inputs.arguments[block][0] for block in (0, 1))
    assert not torch.equal(local["position_embeddings"][0], everything["position_embeddings"][0])
    assert local["attention_mask"] is not None
    assert everything["attention_mask"] is None or not torch.equal(
        local["attention_mask"], everything["attention_mask"]
    )


def test_samples_are_batched_only_where_their_arguments_can_be() -> None:
    hidden = [torch.zeros(1, 3, 4)] * 2
    per_sample = {"mask": torch.zeros(1, 1, 3, 3), "turns": (torch.zeros(1, 3, 2),), "steps": torch.arange(3)}
    inputs = BlockInputs(hidden, [[per_sample]])
    assert inputs.shared()
    together = inputs.arguments_of(0, 0, 2, device=CPU)
    assert together["mask"].shape == (2, 1, 3, 3)
    assert together["turns"][0].shape == (2, 3, 2)
    assert together["steps"].shape == (3,)
    heads_in_front = {"alibi": torch.zeros(8, 1, 3)}
    assert not BlockInputs(hidden, [[heads_in_front]]).shared()


def test_a_model_that_fails_gets_its_blocks_back() -> None:
    model = build("llama", torch.float32)
    blocks = list(model.model.layers)
    with pytest.raises(IndexError):
        capture(model, blocks, [{"input_ids": torch.full((1, 4), 10_000)}])  # beyond the vocabulary
    assert all("forward" not in vars(block) for block in blocks)
