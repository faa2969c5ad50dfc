"""What is known of experts' inputs: every expert has a start, and who saw few tokens is said."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lrquant
from lrquant import Recipe
from lrquant.architectures.targets import experts_alike, expose_linears
from lrquant.reconstruction.input_statistics import InputStatistics
from tests import mixtures

IDS = list(torch.arange(5, 133).view(4, 1, 32))


def test_an_expert_without_tokens_starts_from_the_others() -> None:
    model = mixtures.build("mixtral")
    expose_linears(model)
    seen = InputStatistics(model.model.layers[0])
    seen.samples = 2
    (gates, ups, downs) = experts_alike(model.model.layers[0])
    seen("self_attn.q_proj", torch.ones(2, 7, 64))
    for scale, name in ((1.0, gates[0]), (3.0, gates[2])):
        x = torch.linspace(-scale, 2 * scale, 5 * 64).view(5, 64)
        seen(name, x)
        seen(name, -x[:3])
    statistics = seen.statistics(2)
    assert {*gates, *ups, *downs} <= statistics.keys()
    absmax = [statistics[name].absmax for name in gates]
    assert all(found is not None for found in absmax)
    assert torch.equal(absmax[1], torch.maximum(absmax[0], absmax[2]))  # type: ignore[arg-type]
    assert torch.equal(absmax[1], absmax[3])  # type: ignore[arg-type]
    assert list(seen.tokens({}).values()) == [8, 0, 8, 0]


def test_experts_that_calibration_hardly_reaches_are_named(tmp_path: Path) -> None:
    model = mixtures.build("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[3] = 0
        model.model.layers[1].mlp.gate.weight[2] *= 100
        model.model.layers[1].mlp.gate.weight[1] = -model.model.layers[1].mlp.gate.weight[2]
    recipe = Recipe.preset("lrquant", wbits=4, abits=8, epochs=1, batch_size=2)
    quantized = lrquant.quantize(model, recipe, IDS)
    tokens = quantized.records[1].expert_tokens
    assert sum(tokens.values()) == 2 * 4 * 32
    assert quantized.records[0].expert_tokens.keys() == tokens.keys()
    hardly = [expert for expert, count in tokens.items() if count < 16]
    assert any("were sent" in note and hardly[0] in note for note in quantized.notes) == bool(hardly)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_every_expert_may_be_calibrated_on_all_tokens(rounding: Any) -> None:
    """The statistics are then those of all tokens; what is counted is still what the router sends."""
    recipe = Recipe.preset("lrquant", wbits=4, abits=8, epochs=0, rounding=rounding)
    model = mixtures.build("qwen3_moe")
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[3] = -10 * model.model.layers[0].mlp.gate.weight[:3].sum(0)
    routed, everything = (
        lrquant.quantize(copy.deepcopy(model), recipe.changed(all_experts=all_experts), IDS)
        for all_experts in (False, True)
    )
    assert everything.records[0].expert_tokens == routed.records[0].expert_tokens
    assert sum(everything.records[0].expert_tokens.values()) == 2 * 4 * 32

    def maxima(quantized: lrquant.Quantized) -> list[Tensor]:
        seen = quantized.result.statistics[0]
        return [found for n in range(4) if (found := seen[f"mlp.experts.{n}.gate_proj"].absmax) is not None]

    first, *others = maxima(everything)
    assert len(others) == 3
    assert all(torch.equal(first, other) for other in others)
    assert not all(torch.equal(first, one) for one in maxima(routed))
    ids = IDS[0]
    with torch.no_grad():
        assert not torch.equal(everything.model(ids).logits, routed.model(ids).logits)


def test_zeros_that_an_expert_is_handed_are_no_tokens() -> None:
    quantized = lrquant.quantize(mixtures.build("llama4"), Recipe.preset("rtn", wbits=4, abits=8), IDS)
    assert all(sum(record.expert_tokens.values()) == 4 * 32 for record in quantized.records)
