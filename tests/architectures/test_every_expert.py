"""Smoothing of mixtures: one scale for router, shared and routed experts, one for each expert's up and down."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lrquant.architectures import FoundFamily, family_of
from lrquant.architectures.candidates import candidates
from lrquant.architectures.family import found_notes
from lrquant.architectures.probe import Probe, calls_of, text_inputs
from lrquant.architectures.proof import proven
from lrquant.architectures.targets import expose_linears, linears_of, mixtures_of
from lrquant.transforms import Equivalence, NormToLinears, UpToDown, materialize, reparameterize
from lrquant.transforms.statistics import ChannelStatistics
from tests import mixtures
from tests.models import logits, token_ids

EXACT = 1e-10  # relative to the largest logit, in float64; float32 rounds at 1e-7
IDS = token_ids(2)
MULTIPLIED_ALONE = [name for name in mixtures.MIXTURES if name != "gpt_oss"]  # there one is added to up's output first


@cache
def built(name: str) -> tuple[Any, Tensor, Sequence[Sequence[Equivalence]]]:
    """A mixture in double precision, its logits, and what was found of its blocks."""
    model = mixtures.build(name).double()
    expose_linears(model)
    (stage,) = family_of(model).stages(model)
    return model, logits(model, IDS), [stage.equivalences_of(index) for index in range(2)]


def scaled(block: nn.Module, chosen: Sequence[Equivalence]) -> dict[str, Tensor]:
    """The block's parameters by `chosen` with random scales over a decade."""
    generator = torch.Generator().manual_seed(0)
    params = dict(block.named_parameters())
    statistics = {
        name: ChannelStatistics(torch.ones(linear.in_features), torch.zeros(linear.in_features))
        for name, linear in linears_of(block).items()  # a router has none
    }
    learnables = {}
    for each in chosen:
        start = each.initial(params, statistics, "log", 0.5)["scale"]
        low, high = math.log(0.3), math.log(3)
        random = torch.rand(start.shape, generator=generator, dtype=torch.float64)
        learnables[f"{each.name}.scale"] = (low + (high - low) * random).exp()
    assert len(learnables) == len(chosen)  # every one has a name of its own
    return materialize(params, reparameterize(params, chosen, learnables))


@torch.no_grad()
def deviation(name: str, found: Sequence[Sequence[Equivalence]]) -> float:
    """Largest change of a logit, relative to the largest, once every block is scaled."""
    model, expected, _ = built(name)
    values = {
        f"model.layers.{index}.{parameter}": value
        for index, own in enumerate(found)
        for parameter, value in scaled(model.model.layers[index], own).items()
    }
    originals = {key: model.get_parameter(key).clone() for key in values}
    try:
        for key, value in values.items():
            model.get_parameter(key).copy_(value)
        return float((logits(model, IDS) - expected).abs().max() / expected.abs().max())
    finally:
        for key, value in originals.items():
            model.get_parameter(key).copy_(value)


@pytest.mark.parametrize("name", list(mixtures.MIXTURES))
def test_every_expert_is_smoothed_and_the_function_stays(name: str) -> None:
    model, _, found = built(name)
    block = model.model.layers[1]
    (mixture,) = mixtures_of(block)
    norm = next(each for each in found[1] if isinstance(each, NormToLinears) and each.norm.startswith("post_"))
    experts = {f"{expert}.{name}_proj" for expert in mixture.experts for name in ("gate", "up")}
    parent = mixture.path.rpartition(".")[0]
    shared = {linear for linear in linears_of(block) if "shared" in linear and "down" not in linear}
    readers = experts | shared | set(mixture.gates)
    assert set(norm.linears) >= readers
    routers = set(norm.linears) - readers
    assert len(routers) == (0 if mixture.gates and "qwen2" not in name else 1)
    assert all(linear.startswith(parent) for linear in norm.linears)
    pairs = {(each.up, each.down) for each in found[1] if isinstance(each, UpToDown)}
    expected = {(f"{expert}.up_proj", f"{expert}.down_proj") for expert in mixture.experts}
    assert expected <= pairs if name in MULTIPLIED_ALONE else not pairs
    assert deviation(name, found) < EXACT


@pytest.mark.parametrize("name", ["mixtral", "phimoe", "gpt_oss"])
def test_a_router_that_is_left_out_would_show(name: str) -> None:
    _, _, found = built(name)
    (norm,) = (each for each in found[1] if isinstance(each, NormToLinears) and each.norm.startswith("post_"))
    routers = [linear for linear in norm.linears if ".experts." not in linear]
    experts = NormToLinears(norm.norm, tuple(x for x in norm.linears if x not in routers), shift=False)
    assert deviation(name, [[], [experts]]) > 1e-3
    model = built(name)[0]
    probe = Probe(model.model.layers[1], calls_of(model, "model.layers", text_inputs(model, 9)[0])[1])
    tried = tuple(x for x in experts.linears if x.split(".")[-2] in "01")
    assert proven(probe, [[NormToLinears(norm.norm, tried, shift=False)]]) == ()
    assert proven(probe, [[NormToLinears(norm.norm, (*tried, *routers), shift=False)]]) != ()


def test_up_and_down_of_clamped_experts_are_refused() -> None:
    """gpt-oss clamps up's output and adds one to it: neither stays when it is scaled."""
    model, _, _ = built("gpt_oss")
    probe = Probe(model.model.layers[0], calls_of(model, "model.layers", text_inputs(model, 9)[0])[0])
    wrong = UpToDown("mlp.experts.0.up_proj", "mlp.experts.0.down_proj")
    assert not any(isinstance(each, UpToDown) for group in candidates(probe.trace()) for each in group)
    assert proven(probe, [[wrong]]) == ()


def test_of_many_experts_a_few_are_tried() -> None:
    """A skeleton of 64 experts, of which nine tokens cannot reach half; values are made for two."""
    config = mixtures.config_of("qwen3_moe").__class__(
        **mixtures.COMMON | {"num_experts": 64, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).eval()
    expose_linears(model)
    family = family_of(model)
    assert isinstance(family, FoundFamily)
    (stage,) = family.stages(model)
    found = stage.equivalences_of(0)
    assert sum(isinstance(each, UpToDown) for each in found) == 64
    (norm,) = (each for each in found if isinstance(each, NormToLinears) and each.norm.startswith("post_"))
    assert len(norm.linears) == 2 * 64 + 1
    probe = Probe(model.model.layers[0], calls_of(model, "model.layers", text_inputs(model, 9)[0])[0])
    storages = {value.data_ptr() for name, value in probe.values.items() if ".experts." in name}
    assert len(storages) == 2 * 3
    assert sum(".experts." in name for name in probe.trace().linears) == 2 * 3
    (note, *_) = found_notes("qwen3_moe", [stage])
    assert note.count("experts") == 1
    assert "mlp.experts.*.up->down" in note
