"""Learned rounding: offsets move weights to other integers, and the checkpoint holds the integers that training saw."""

from pathlib import Path

import pytest
import torch

import lrquant
from lrquant import Recipe
from lrquant.architectures import family_of
from lrquant.reconstruction.block_parameters import freeze, quantized_parameters
from lrquant.reconstruction.fixed_parameters import BlockParameters
from lrquant.reconstruction.learnables import Start, first_values
from lrquant.reconstruction.learnables.clipping import Clipping
from lrquant.reconstruction.learnables.rates import MOST_ROUNDING_RATE, rounding_rate
from tests.tiny import SETTINGS, write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(("wbits", "group_size"), [(2, 32), (4, None)])
def test_training_sees_the_frozen_integers(wbits: int, group_size: int | None, tiny: Path) -> None:
    """Random offsets, clips and rotations in bfloat16 storage: the dequantized weights agree bit for bit."""
    model = lrquant.load(str(tiny))
    recipe = Recipe.preset("lrquant-max", wbits=wbits, abits=16, group_size=group_size)
    block = model.get_submodule(family_of(model).blocks)[0]
    fixed = BlockParameters.of(block, (), recipe.scheme, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    start = Start(recipe)
    nearest = freeze(fixed, Clipping().start(fixed, start))
    learnables = first_values(fixed, start)
    for name, tensor in learnables.items():
        if name.endswith(".offset"):
            tensor.uniform_(-0.5, 0.5, generator=generator)
        elif name.endswith(".rotation"):
            tensor.uniform_(0.8, 1.2, generator=generator)
    seen = quantized_parameters(fixed, learnables, torch.float32)
    frozen = freeze(fixed, learnables)
    stored = frozen.parameters(torch.float32)
    for linear in fixed.linears:
        name = f"{linear}.weight"
        torch.testing.assert_close(seen[name], stored[name], rtol=0, atol=0)
    moved = [
        (frozen.weights[linear].codes.int() - nearest.weights[linear].codes.int()).abs() for linear in fixed.linears
    ]
    assert all(difference.max() == 1 for difference in moved)  # by one at most, and some do


def test_learned_rounding_lowers_the_loss_further(tiny: Path) -> None:
    settings = {**SETTINGS, "wbits": 2, "abits": 16, "group_size": 32, "epochs": 8, "seed": 1}
    nearest = lrquant.quantize(str(tiny), Recipe.preset("lrquant", **settings))
    learned = lrquant.quantize(str(tiny), Recipe.preset("lrquant", rounding="learned", **settings))
    assert learned.records[0].final_loss < 0.95 * nearest.records[0].final_loss


def test_compensation_lowers_the_loss_further(tiny: Path) -> None:
    settings = {**SETTINGS, "wbits": 2, "abits": 16, "group_size": 32, "epochs": 8, "seed": 1}
    nearest = lrquant.quantize(str(tiny), Recipe.preset("lrquant", **settings))
    compensated = lrquant.quantize(str(tiny), Recipe.preset("lrquant", rounding="gptq", **settings))
    assert compensated.records[0].final_loss < 0.97 * nearest.records[0].final_loss


def test_the_rate_lets_an_offset_cross_its_range() -> None:
    recipe = Recipe.preset("lrquant-max", wbits=2, abits=16)
    for steps in (160, 2560):
        assert rounding_rate(recipe, steps) * steps / 2 >= 1  # a cosine's mean rate is half its first
    assert rounding_rate(recipe, 2) == MOST_ROUNDING_RATE
    assert rounding_rate(recipe.changed(rounding_lr=0.001), 2) == 0.001
