"""LRQuant+'s rotation vectors: rank one folds into the scales, higher ranks are dense and say so."""

import json
from pathlib import Path

import pytest
import torch
from torch.func import functional_call

import lrquant
from lrquant import Recipe
from lrquant.architectures import family_of
from lrquant.method_presets import PAPER_EXACT
from lrquant.reconstruction.block_parameters import freeze, quantized_parameters
from lrquant.reconstruction.fixed_parameters import BlockParameters
from lrquant.reconstruction.learnables import Start
from lrquant.reconstruction.learnables.clipping import Clipping
from lrquant.reconstruction.learnables.rank_k_rotation import RankKRotation
from lrquant.reconstruction.learnables.rotation_vector import RotationVector
from tests.tiny import SETTINGS, write_tiny

IDS = torch.arange(5, 69)[None]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize(
    ("storage", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)],  # a folded scale is rounded once more: 2⁻²⁴ or 2⁻⁹ relative
)
def test_folding_changes_the_logits_by_rounding_only(
    group_size: int | None, storage: torch.dtype, tolerance: float, tiny: Path
) -> None:
    """Rotations far from one, as dequantized weights times R and as folded into the scales."""
    model = lrquant.load(str(tiny))
    recipe = Recipe.preset("lrquant+", wbits=3, abits=16, group_size=group_size)
    generator = torch.Generator().manual_seed(0)
    apart: dict[str, torch.Tensor] = {}
    folded: dict[str, torch.Tensor] = {}
    unrotated: dict[str, torch.Tensor] = {}
    for index, block in enumerate(model.get_submodule(family_of(model).blocks)):
        fixed = BlockParameters.of(block, (), recipe.scheme, storage)
        learnables = Clipping().start(fixed, Start(recipe))
        for target, rotate in ((unrotated, False), (apart, True)):
            if rotate:
                for name, ones in RotationVector().start(fixed, Start(recipe)).items():
                    learnables[name] = ones + 0.5 * torch.rand(ones.shape, generator=generator)
            for name, value in quantized_parameters(fixed, learnables, torch.float32).items():
                target[f"model.layers.{index}.{name}"] = value
        for name, value in freeze(fixed, learnables).parameters(torch.float32).items():
            folded[f"model.layers.{index}.{name}"] = value
    with torch.no_grad():
        plain, wanted, got = (
            functional_call(model, parameters, (IDS,), {"use_cache": False}).logits
            for parameters in (unrotated, apart, folded)
        )
    assert (got - wanted).norm() <= tolerance * wanted.norm()
    assert (plain - wanted).norm() > 0.1 * wanted.norm()  # the rotation itself is no matter of rounding


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_every_rank_starts_at_one(rank: int, tiny: Path) -> None:
    model = lrquant.load(str(tiny))
    block = model.get_submodule(family_of(model).blocks)[0]
    recipe = Recipe.preset("lrquant+", rotation_rank=rank)
    fixed = BlockParameters.of(block, (), recipe.scheme, torch.float32)
    plain = quantized_parameters(fixed, {}, torch.float32)
    rotation = RotationVector() if rank == 1 else RankKRotation()
    assert rotation.enabled(recipe)
    rotated = quantized_parameters(fixed, rotation.start(fixed, Start(recipe)), torch.float32)
    assert all(torch.equal(plain[name], rotated[name]) for name in plain)


@pytest.mark.parametrize(("wbits", "abits"), [(4, 4), (2, 16)])
def test_higher_ranks_are_a_dense_export_that_says_so(wbits: int, abits: int, tiny: Path, tmp_path: Path) -> None:
    recipe = Recipe.preset("lrquant+", wbits=wbits, abits=abits, rotation_rank=2, **SETTINGS)
    quantized = lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "out", keep_model=True)
    assert any("dense" in note for note in quantized.notes)
    assert "dense" in (tmp_path / "out" / "README.md").read_text()
    assert quantized.sizes.bits_per_weight == 16.0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert all(group["weights"] is None for group in config["config_groups"].values())
    assert torch.equal(logits(lrquant.load(str(tmp_path / "out"))), logits(quantized.model))


def test_shifts_of_a_dense_export_survive_the_disk(tiny: Path, tmp_path: Path) -> None:
    recipe = Recipe.preset("lrquant+", wbits=4, abits=16, rotation_rank=2, shift="on", **SETTINGS)
    quantized = lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "out", keep_model=True)
    assert torch.equal(logits(lrquant.load(str(tmp_path / "out"))), logits(quantized.model))


def test_paper_exact_is_the_published_setting() -> None:
    """20 epochs, one sample a step, a constant rate, all parts, no scale between up and down projections."""
    recipe = Recipe.preset("lrquant+", paper_exact=True, wbits=4, abits=4)
    assert (recipe.epochs, recipe.batch_size, recipe.schedule) == (20, 1, "constant")
    assert recipe.two_branch
    assert recipe.dynamic_loss
    assert recipe.rotation_vectors
    assert recipe.let
    assert not recipe.smooth_mlp
    assert recipe.shift == "on"
    assert not Recipe.preset("lrquant+", paper_exact=True, wbits=2, abits=16).let  # weight-only: clipping and rotation
    with pytest.raises(lrquant.UsageError, match="rtn learns nothing"):
        Recipe.preset("rtn", paper_exact=True)
    assert set(PAPER_EXACT) == {"omniquant", "lrquant", "lrquant+"}
