"""Tuning as a whole: what is learned is what is stored, integers stay, the answer comes nearer to the original's."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

import lrquant
from lrquant import Recipe
from lrquant.losses import divergence
from tests import models, vision_models
from tests.reconstruction.test_towers import quantized, save
from tests.resume.test_resume import contents
from tests.tiny import write_tiny

IDS = [torch.arange(first, first + 32)[None] for first in (100, 300, 500, 700)]
NOT_MOVING = 1e-30  # a rate at which factors stay one


def recipe(**changes: Any) -> Recipe:
    return Recipe.preset(**{"method": "rtn", "wbits": 3, "abits": 16, "batch_size": 2, "tuning_lr": 3e-3, **changes})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("name", list(models.MODELS))
def test_factors_of_one_change_nothing(name: str) -> None:
    original = models.build(name, torch.float32)
    ids = list(models.token_ids(3).split(1))
    plain = lrquant.quantize(deepcopy(original), recipe(abits=8), ids).model
    tuned = lrquant.quantize(deepcopy(original), recipe(abits=8, tuning_epochs=1, tuning_lr=NOT_MOVING), ids)
    with torch.no_grad():
        wanted = [model(input_ids=torch.cat(ids), use_cache=False).logits for model in (original, plain, tuned.model)]
    assert torch.equal(wanted[1], wanted[2])
    assert tuned.result.tuning is not None
    assert tuned.result.tuning.initial_loss == pytest.approx(float(divergence(wanted[1], wanted[0])), rel=1e-3)
    assert {path for path, _ in tuned.model.named_modules()} == {path for path, _ in plain.named_modules()}


@pytest.mark.parametrize(
    "changes",
    [{"wbits": 2, "group_size": 32}, {"wbits": 4, "abits": 4, "symmetric": True}, {"wbits": 6, "abits": 8}],
    ids=str,
)
def test_scales_change_and_integers_do_not(changes: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    before = lrquant.quantize(str(tiny), recipe(**changes), IDS)
    after = lrquant.quantize(str(tiny), recipe(**changes, tuning_epochs=3), IDS, save_dir=tmp_path / "out")
    again = lrquant.quantize(str(tiny), recipe(**changes, tuning_epochs=3), IDS)
    for one, other, same in zip(before.result.frozen, after.result.frozen, again.result.frozen, strict=True):
        for linear, weight in one.weights.items():
            assert torch.equal(weight.codes, other.weights[linear].codes)
            assert weight.zero is None or torch.equal(weight.zero, other.weights[linear].zero)
            assert not torch.equal(weight.scale, other.weights[linear].scale)
            assert torch.equal(same.weights[linear].scale, other.weights[linear].scale)
    tuning = after.result.tuning
    assert tuning is not None
    assert tuning.final_loss < tuning.initial_loss
    assert len(tuning.epoch_losses) == 3
    loaded = lrquant.load(str(tmp_path / "out"))
    with torch.no_grad():
        wanted = lrquant.load(str(tiny))(input_ids=torch.cat(IDS), use_cache=False).logits
        found = loaded(input_ids=torch.cat(IDS), use_cache=False).logits
        assert torch.equal(found, after.model(input_ids=torch.cat(IDS), use_cache=False).logits)
    assert float(divergence(found, wanted)) == pytest.approx(tuning.final_loss, rel=1e-2)
    assert any("divergence from the original" in note for note in after.notes)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4a16"])
def test_four_bit_floats_tune_their_vectors(format: str, tiny: Path, tmp_path: Path) -> None:
    floats = Recipe.preset("rtn", format=format, batch_size=2, tuning_epochs=2)
    result = lrquant.quantize(str(tiny), floats, IDS, save_dir=tmp_path / "out")
    tuning = result.result.tuning
    assert tuning is not None
    assert tuning.final_loss < tuning.initial_loss
    loaded = lrquant.load(str(tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS[0]).logits, result.model(input_ids=IDS[0]).logits)


def test_a_run_that_ended_while_tuning_goes_on_to_the_same_bytes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned = recipe(method="lrquant-max", wbits=4, abits=8, epochs=1, tuning_epochs=2)
    with monkeypatch.context() as patch:
        patch.setattr("lrquant.passes.end_to_end.tune", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            lrquant.quantize(str(tiny), learned, IDS, save_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    resumed = lrquant.quantize(str(tiny), learned, IDS, save_dir=tmp_path / "out")
    lrquant.quantize(str(tiny), learned, IDS, save_dir=tmp_path / "elsewhere")
    assert contents(tmp_path / "out") == contents(tmp_path / "elsewhere")
    assert resumed.records[0].outcome in ("learned", "best epoch")


@pytest.mark.parametrize("name", vision_models.MODELS)
def test_models_that_see(name: str, tmp_path: Path) -> None:
    """Towers one behind the other, samples that cannot be joined, and towers alone, which answer without logits."""
    model, result, how = quantized(name, method="rtn", wbits=3, abits=8, tuning_epochs=2, tuning_lr=3e-3)
    assert (result.tuning is None) == name.endswith("-alone")
    if result.tuning is not None:
        assert result.tuning.final_loss < result.tuning.initial_loss
        save(tmp_path / "saved", model, result, how)
        (inputs,) = vision_models.inputs_of(name, dtype=torch.float32)
        with torch.no_grad():
            loaded = lrquant.load(str(tmp_path / "saved"))
            assert torch.equal(vision_models.output_of(loaded, inputs), vision_models.output_of(model, inputs))
