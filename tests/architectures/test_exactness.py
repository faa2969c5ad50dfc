"""Every transformation of every family leaves the model's function exactly as it was.

Computed in float64 throughout (see `InDouble`), with scales over a decade and shifts of the size of the
activations. Exactness then means agreement to rounding, 1e-16 times the some hundred operations that a
value passes through; a wrong channel, head or bias changes logits by percents.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrquant.architectures import Family, family_of
from lrquant.architectures.family import _families
from lrquant.architectures.layouts import unpaired
from lrquant.reconstruction.block_preparation import choose_shifts
from lrquant.transforms import Equivalence, QueryKey, ValueToOutput, materialize, reparameterize
from lrquant.transforms.bias_slots import add_bias_slots
from lrquant.transforms.statistics import ChannelStatistics
from tests.models import MODELS, build, config_of, logits, token_ids

EXACT = 1e-10  # relative to the largest logit
IDS = token_ids(2)
ROTARY = [name for name in MODELS if not name.startswith("opt") and not name.startswith("falcon-alibi")]


@cache
def original_logits(name: str) -> Tensor:
    return logits(build(name), IDS)


@cache
def equivalences_of(name: str) -> Sequence[Equivalence]:
    model = build(name)
    return family_of(model).equivalences(model.config)


@torch.no_grad()
def transform(model: Any, chosen: Sequence[Equivalence], shift: str) -> None:
    """Reparameterise every block of `model` in place by random scales, and by random shifts where `shift` says."""
    generator = torch.Generator().manual_seed(0)
    for block in model.get_submodule(family_of(model).blocks):
        shifted, slots = choose_shifts(block, chosen, shift)
        params = dict(block.named_parameters())
        learnables: dict[str, Tensor] = {}
        for equivalence in chosen:
            start = equivalence.initial(params, unit_statistics(block), "log", 0.5)
            low, high = math.log(0.3), math.log(3)
            random = torch.rand(start["scale"].shape, generator=generator, dtype=torch.float64)
            learnables[f"{equivalence.name}.scale"] = (low + (high - low) * random).exp()
            if equivalence.name in shifted:
                random = torch.randn(start["shift"].shape, generator=generator, dtype=torch.float64)
                learnables[f"{equivalence.name}.shift"] = random
        add_bias_slots(block, slots)
        params = dict(block.named_parameters())
        changed = reparameterize(params, chosen, learnables)
        touched = {*changed.vectors, *(f"{linear}.weight" for linear in changed.row.keys() | changed.column.keys())}
        assert touched
        for name, value in materialize(params, changed).items():
            assert torch.equal(value, params[name]) is (name not in touched), name
            params[name].copy_(value)


def unit_statistics(block: nn.Module) -> dict[str, ChannelStatistics]:
    """Statistics of the right shapes for every linear."""
    return {
        name: ChannelStatistics(torch.ones(module.in_features), torch.zeros(module.in_features))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }


def deviation(name: str, chosen: Sequence[Equivalence], shift: str) -> float:
    """Largest change of a logit, relative to the largest logit."""
    model = build(name)
    transform(model, chosen, shift)
    expected = original_logits(name)
    return ((logits(model, IDS) - expected).abs().max() / expected.abs().max()).item()


CASES = [(name, index) for name in MODELS for index in range(len(equivalences_of(name)))]


@pytest.mark.parametrize(("name", "index"), CASES, ids=[f"{n}-{equivalences_of(n)[i].name}" for n, i in CASES])
def test_one_transformation_is_exact(name: str, index: int) -> None:
    assert deviation(name, equivalences_of(name)[index : index + 1], "auto") < EXACT


@pytest.mark.parametrize("name", MODELS)
def test_all_transformations_together_are_exact(name: str) -> None:
    assert deviation(name, equivalences_of(name), "auto") < EXACT


@pytest.mark.parametrize("name", MODELS)
def test_shifts_are_exact_where_biases_had_to_be_added(name: str) -> None:
    assert deviation(name, equivalences_of(name), "on") < EXACT


@pytest.mark.parametrize("name", ROTARY)
def test_separate_scales_for_channels_that_rotate_together_would_show(name: str) -> None:
    (query_key,) = (e for e in equivalences_of(name) if isinstance(e, QueryKey))
    broken = dataclasses.replace(query_key, pair=unpaired(len(query_key.pair)))
    assert deviation(name, [broken], "auto") > 1e-3


def test_scales_of_another_value_head_would_show() -> None:
    (value,) = (e for e in equivalences_of("llama") if isinstance(e, ValueToOutput))
    broken = dataclasses.replace(value, output_columns=value.output_columns.flip(0))
    assert deviation("llama", [broken], "auto") > 1e-3


def test_every_known_family_is_checked_here() -> None:
    known = {name for name, family in _families().items() if isinstance(family, Family) and family.tower == "language"}
    assert {config_of(name).model_type for name in MODELS} == known


# --- Which transformations learn a shift ---


def chosen_shifts(name: str, shift: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    model = build(name)
    block = model.get_submodule(family_of(model).blocks)[0]
    return choose_shifts(block, equivalences_of(name), shift)


def test_shifts_are_automatic_where_every_bias_is_there() -> None:
    norms = ("self_attn_layer_norm->linears", "final_layer_norm->linears")
    assert chosen_shifts("opt", "auto") == ((*norms, "value->output"), ())
    assert chosen_shifts("llama", "auto") == ((), ())
    assert chosen_shifts("qwen2", "auto") == ((), ())  # biases on q, k, v; none on the norm and the output
    assert chosen_shifts("llama-biases", "auto") == (("value->output",), ())
    assert chosen_shifts("neox-no-bias", "auto") == (("post_attention_layernorm->linears",), ())


def test_shifts_that_are_asked_for_name_the_biases_to_add() -> None:
    shifted, slots = chosen_shifts("qwen2", "on")
    assert shifted == ("input_layernorm->linears", "post_attention_layernorm->linears", "value->output")
    norms_and_mlp = {"input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj"}
    assert set(slots) == norms_and_mlp | {"self_attn.o_proj"}
    assert len(slots) == len(set(slots))
    assert chosen_shifts("opt", "on")[1] == ()


def test_no_shifts_when_switched_off() -> None:
    assert chosen_shifts("opt", "off") == ((), ())
