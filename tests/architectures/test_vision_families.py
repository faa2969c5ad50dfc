"""Every vision and multimodal family's transformations leave the model's function as it is."""

import pytest
import torch
from torch import Tensor, nn

from lrquant.architectures import family_of
from lrquant.errors import UsageError
from lrquant.transforms import materialize, reparameterize
from lrquant.transforms.bias_slots import missing_biases
from tests.models import InDouble
from tests.vision_models import MODELS, MULTIMODAL, build, inputs_of, output_of

# In float64 rounding is near 1e-15; scales of up to e multiply it through two to four blocks.
TOLERANCE = 1e-9


@torch.no_grad()
def transform_everything(model: nn.Module) -> list[Tensor]:
    """Every transformation of every tower, with random scales, and random shifts where biases hold them."""
    generator = torch.Generator().manual_seed(1)
    factors = []
    for stage in family_of(model).stages(model, family_of(model).towers):
        for block in stage.blocks(model):
            params = dict(block.named_parameters())
            learnables = {}
            for equivalence in stage.equivalences:
                width = scale_width(equivalence, params)
                scale = torch.randn(width, generator=generator, dtype=torch.float64).exp()
                learnables[f"{equivalence.name}.scale"] = scale
                if equivalence.bias_slots and not missing_biases(block, equivalence.bias_slots):
                    shift = torch.randn(width, generator=generator, dtype=torch.float64)
                    learnables[f"{equivalence.name}.shift"] = shift
                factors.append(scale)
            changed = materialize(params, reparameterize(params, stage.equivalences, learnables))
            for name, value in changed.items():
                params[name].copy_(value)
    return factors


def scale_width(equivalence, params) -> int:
    """As many scales as the transformation starts with."""
    from lrquant.transforms.statistics import ChannelStatistics

    statistics = {
        name.removesuffix(".weight"): ChannelStatistics(torch.ones(value.shape[-1]), torch.zeros(value.shape[-1]))
        for name, value in params.items()
        if value.ndim == 2
    }
    return equivalence.initial(params, statistics, "log", 0.5)["scale"].numel()


@pytest.mark.parametrize("name", MODELS)
def test_transformations_are_exact(name: str) -> None:
    model = build(name)
    (inputs,) = inputs_of(name)
    with torch.no_grad(), InDouble():
        before = output_of(model, inputs)
        factors = transform_everything(model)
        after = output_of(model, inputs)
    assert len(factors) >= 8  # two blocks of at least four transformations
    torch.testing.assert_close(after, before, rtol=TOLERANCE, atol=TOLERANCE * float(before.abs().max()))


@pytest.mark.parametrize("name", ["swin", "swin-padded"])
def test_swin_shifts_everything_but_the_norm_that_padding_follows(name: str) -> None:
    model = build(name)
    (stage, _) = family_of(model).stages(model)
    shifting = {equivalence.name for equivalence in stage.equivalences if equivalence.bias_slots}
    assert shifting == {"layernorm_after->linears", "value->output"}


@pytest.mark.parametrize("name", MULTIMODAL)
def test_towers_come_in_the_order_that_data_flows(name: str) -> None:
    model = build(name)
    family = family_of(model)
    both, language = family.stages(model, ("language", "vision")), family.stages(model)
    assert len(both) == 2
    assert [stage.path for stage in both[1:]] == [stage.path for stage in language]
    order = []
    handles = [
        stage.blocks(model)[0].register_forward_pre_hook(lambda *_, path=stage.path: order.append(path))
        for stage in both
    ]
    with torch.no_grad():
        output_of(model, inputs_of(name)[0])
    for handle in handles:
        handle.remove()
    assert list(dict.fromkeys(order)) == [stage.path for stage in both]


def test_a_tower_that_is_not_there_is_named() -> None:
    model = build("vit")
    with pytest.raises(UsageError, match=r"'language'.*vision"):
        family_of(model).stages(model, ("language",))
