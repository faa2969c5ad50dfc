"""The table of learnables: every tensor belongs to one, which knows its rate and bounds."""

import pytest
import torch

from lrquant import Recipe
from lrquant.architectures import Family, family_of
from lrquant.architectures.targets import linears_of
from lrquant.reconstruction.fixed_parameters import BlockParameters
from lrquant.reconstruction.learnables import Start, first_values, keep_within_bounds, learnable_of, parameter_groups
from lrquant.transforms.smoothing import LEAST_SCALE
from lrquant.transforms.statistics import ChannelStatistics
from tests import models


def test_every_tensor_has_one_learnable_a_rate_and_bounds() -> None:
    recipe = Recipe.preset("lrquant-max", wbits=4, abits=4)
    model = models.build("llama", torch.float32)
    family = family_of(model)
    assert isinstance(family, Family)
    block = model.get_submodule(family.blocks)[0]
    fixed = BlockParameters.of(block, family.equivalences(model.config), recipe.scheme, torch.float32)
    statistics = {
        name: ChannelStatistics(torch.ones(linear.in_features), torch.zeros(linear.in_features))
        for name, linear in linears_of(block).items()
    }
    values = first_values(fixed, Start(recipe.changed(init="neutral"), statistics=statistics))
    kinds = {type(learnable_of(name)).__name__ for name in values}
    assert kinds == {"Smoothing", "Clipping", "RotationVector", "RoundingOffset"}
    groups = parameter_groups(values, recipe, 100)
    assert sum(len(group["params"]) for group in groups) == len(values)
    assert all(group["lr"] > 0 for group in groups)
    for tensor in values.values():
        tensor.fill_(-1.0)
    keep_within_bounds(values)
    lowest = {name.rpartition(".")[2]: float(tensor.min()) for name, tensor in values.items()}
    assert lowest.pop("scale") == pytest.approx(LEAST_SCALE)
    assert set(lowest.values()) == {-1.0}  # nothing else is bounded
