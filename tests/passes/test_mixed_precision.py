"""Mixed precision: the choice by hand and against every other choice, and what a checkpoint of it holds."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lrquant
from lrquant import Recipe
from lrquant.errors import UsageError
from lrquant.formats import Scheme, quantize_weight
from lrquant.formats.integers import integers
from lrquant.passes.mixed_precision import Unit, best_rounding, choose, storage_bits
from lrquant.reconstruction.callbacks import Callback
from tests.export.test_round_trip import logits
from tests.tiny import SETTINGS, write_tiny


def unit(name: str, weights: int, errors: dict[int, float]) -> Unit:
    return Unit((name,), weights, {bits: bits * weights for bits in errors}, errors)


def test_bits_go_where_they_buy_most() -> None:
    units = [
        unit("calm", 100, {2: 0.2, 3: 0.1, 4: 0.05}),
        unit("sensitive", 100, {2: 9.0, 3: 3.0, 4: 1.0}),
        unit("large", 400, {2: 8.0, 3: 4.0, 4: 3.0}),
    ]
    # Falls per bit a weight: sensitive 6 then 2 per 100, large 4 per 400, calm 0.1 per 100.
    assert choose(units, 2.0) == [2, 2, 2]
    assert choose(units, 2 + 1 / 6) == [2, 3, 2]
    assert choose(units, 2 + 2 / 6) == [2, 4, 2]
    assert choose(units, 3.0) == [2, 4, 3]
    assert choose(units, 4.0) == [4, 4, 4]


def test_no_other_choice_of_that_size_is_better() -> None:
    generator = torch.Generator().manual_seed(0)
    errors = [float(e) for e in torch.rand(5, generator=generator)]
    units = [unit(str(i), 64, {bits: error * 4.0**-bits for bits in (2, 3, 4)}) for i, error in enumerate(errors)]
    for budget in range(10, 20):
        chosen = choose(units, budget / 5)
        assert sum(chosen) == budget
        total = sum(each.errors[bits] for each, bits in zip(units, chosen, strict=True))
        for other in itertools.product((2, 3, 4), repeat=5):
            if sum(other) <= budget:
                assert total <= sum(each.errors[bits] for each, bits in zip(units, other, strict=True)) + 1e-12


@pytest.mark.parametrize("target", [1.9, 4.1])
def test_a_target_out_of_reach_names_what_is(target: float) -> None:
    with pytest.raises(UsageError, match=rf"target bits {target}: .* have 2.00 to 4.00 bits on average"):
        choose([unit("one", 10, {2: 1.0, 4: 0.1})], target)


def test_clipping_is_chosen_for_every_group() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 30.0  # worth keeping whole; other rows of two bits are better off clipped
    format = integers(2, group_size=64)
    rounded = best_rounding(weight, format, torch.float32)
    plain = quantize_weight(weight, format).dequantized()
    errors, before = ((found - weight).square().sum(1) for found in (rounded, plain))
    assert (errors <= before + 1e-6).all()
    assert errors.sum() < 0.9 * before.sum()


def test_sizes_are_those_on_disk() -> None:
    mixed = {"linear": 3}
    shape, dtype = (32, 64), torch.bfloat16
    symmetric = Scheme.integer(4, group_size=32, symmetric=True)
    assert storage_bits(shape, symmetric, dtype) == 32 * 64 * 4 + 64 * 16
    padded = Scheme(Scheme.integer(4).weights, bits=mixed).of("linear")  # a word for each zero point
    assert storage_bits(shape, padded, dtype) == 32 * 64 * 3 + 32 * (16 + 32)
    assert storage_bits(shape, Scheme.integer(4, 8, symmetric=True), dtype) == 32 * 64 * 8 + 32 * 16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first block's MLP does hardly anything, so that its weights need few bits."""
    folder = write_tiny(tmp_path_factory.mktemp("tiny"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1e-3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


MIXED: dict[str, dict[str, Any]] = {
    "weights alone": {"abits": 16, "target_bits": 4.0},
    "symmetric groups": {"abits": 16, "target_bits": 3.5, "symmetric": True, "group_size": 64},
    "inputs too": {"abits": 8, "target_bits": 4.0},
}


@pytest.mark.parametrize("name", MIXED)
def test_the_checkpoint_computes_what_the_model_in_memory_does(name: str, tiny: Path, tmp_path: Path) -> None:
    recipe = Recipe.preset("lrquant", **MIXED[name], **SETTINGS, quantize_attention=False)
    quantized = lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "out", keep_model=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    assert torch.equal(logits(plain), logits(quantized.model))
    bits = quantized.recipe.layer_bits
    assert bits is not None
    assert len(set(bits.values())) > 1
    assert bits["model.layers.0.mlp.down_proj"] == min(bits.values())
    assert quantized.sizes.bits_per_weight <= MIXED[name]["target_bits"]
    for block in (0, 1):  # what runtimes fuse has one format
        attention = {bits[f"model.layers.{block}.self_attn.{linear}_proj"] for linear in "qkv"}
        assert len(attention) == 1
        assert bits[f"model.layers.{block}.mlp.gate_proj"] == bits[f"model.layers.{block}.mlp.up_proj"]
    assert any("Bits of each linear" in note for note in quantized.notes)
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    on_disk = Counter({group["weights"]["num_bits"]: len(group["targets"]) for group in groups.values()})
    assert on_disk == Counter(bits.values())


@pytest.mark.parametrize("damaged", [False, True], ids=["as it was left", "damaged"])
def test_an_interrupted_run_and_its_own_recipe_end_in_the_same_bytes(damaged: bool, tiny: Path, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    class Stop(Callback):
        def block_done(self, record: object) -> None:
            raise Interrupted

    recipe = Recipe.preset("lrquant", **MIXED["weights alone"], **SETTINGS)
    lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "whole")
    with pytest.raises(Interrupted):
        lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "cut", callback=Stop())
    bits = tmp_path / ".cut.lrquant" / "bits.json"  # errors are not measured a second time
    if damaged:
        bits.write_text(bits.read_text()[:-9])
    assert bits.is_file()
    resumed = lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "cut")
    assert any("bits.json: damaged" in note and "measured again" in note for note in resumed.notes) == damaged
    lrquant.quantize(str(tiny), Recipe.from_yaml(tmp_path / "whole" / "recipe.yaml"), save_dir=tmp_path / "again")
    first, *others = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut", "again"))
    assert all(other == first for other in others)
