"""The engine keeps its promises: nothing ends worse, non-finite numbers are survived, streams are right."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lrquant
from lrquant import LrquantError, Recipe, UsageError
from lrquant.reconstruction import block_optimizer as learning
from lrquant.reconstruction.block_optimizer import has_flattened
from tests.tiny import SETTINGS, write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def recipe(**changes: Any) -> Recipe:
    return Recipe.preset(**{"method": "lrquant", "wbits": 3, "abits": 4, **SETTINGS, "epochs": 3, **changes})


def test_learning_lowers_every_blocks_loss(tiny: Path) -> None:
    for record in lrquant.quantize(str(tiny), recipe(epochs=5, let_lr=0.02, lwc_lr=0.05)).records:
        assert record.outcome == "learned"
        assert record.final_loss < record.initial_loss
        assert len(record.epoch_losses) == 5
        assert record.epoch_losses[-1] < record.epoch_losses[0]


def test_no_block_ends_worse_than_it_began(tiny: Path) -> None:
    """Rates a hundred times too large wreck the learnables; what was there before comes back."""
    records = lrquant.quantize(str(tiny), recipe(let_lr=1.0, lwc_lr=1.0, schedule="constant")).records
    assert all(record.final_loss <= record.initial_loss for record in records)
    assert any(record.outcome != "learned" for record in records)


@pytest.mark.parametrize("bad_calls", [{7}, {7, 12, 15}, set(range(7, 10_000))])
def test_a_non_finite_loss_never_stops_a_run(tiny: Path, monkeypatch: pytest.MonkeyPatch, bad_calls: set[int]) -> None:
    calls = 0
    honest = learning.terms

    def sometimes_nan(*arguments: Any) -> Any:
        nonlocal calls
        squared, direction = honest(*arguments)
        if torch.is_grad_enabled():
            calls += 1
            if calls in bad_calls:
                squared = squared * math.nan
        return squared, direction

    monkeypatch.setattr(learning, "terms", sometimes_nan)
    quantized = lrquant.quantize(str(tiny), recipe(epochs=8))
    first, *rest = quantized.records
    assert sum(record.recoveries for record in quantized.records) >= min(len(bad_calls), 3)
    assert all(math.isfinite(record.final_loss) for record in (first, *rest))
    assert all(record.final_loss <= record.initial_loss for record in (first, *rest))
    assert any("non-finite" in note for note in quantized.notes)


def test_weights_with_nan_are_refused_by_name(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    ids = [torch.arange(32)[None]]
    with pytest.raises(LrquantError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        lrquant.quantize(model, recipe(), calibration=ids)


@pytest.mark.parametrize("method", ["rtn", "smoothquant", "omniquant", "lrquant", "lrquant+"])
@pytest.mark.parametrize("model_type", ["llama", "opt", "gemma2", "falcon"])
def test_every_method_on_different_blocks(method: str, model_type: str, tmp_path: Path) -> None:
    special = {
        "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
        "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
        "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 128},
    }
    tiny = write_tiny(tmp_path / "tiny", model_type, **special.get(model_type, {}))
    quantized = lrquant.quantize(str(tiny), recipe(method=method, wbits=4, abits=6, epochs=1))
    with torch.no_grad():
        assert torch.isfinite(quantized.model(input_ids=torch.arange(48)[None]).logits).all()
    assert all(0.5 < record.cosine <= 1.0001 for record in quantized.records)


def test_more_bits_are_closer(tiny: Path) -> None:
    """At 8 bits the quantized stream all but follows the full-precision one; at 2 it does not."""
    last = {
        bits: lrquant.quantize(str(tiny), recipe(method="rtn", wbits=bits, abits=16)).records[-1].cosine
        for bits in (2, 4, 8)
    }
    assert last[2] < last[4] < last[8]
    assert last[8] > 0.999  # a relative error of about 1 % per linear would already lose more


def test_batches_and_single_samples_see_the_same_targets(tiny: Path) -> None:
    """The squared error before learning does not depend on how many samples share a call."""
    one, four = (lrquant.quantize(str(tiny), recipe(batch_size=n, epochs=0, loss="mse")).records for n in (1, 4))
    for single, batched in zip(one, four, strict=True):
        assert single.initial_loss == pytest.approx(batched.initial_loss, rel=1e-3)


def test_statistics_can_be_given_instead_of_gathered(tiny: Path) -> None:
    first = lrquant.quantize(str(tiny), recipe(epochs=0))
    again = lrquant.quantize(str(tiny), recipe(epochs=0, calibration="zoo:pycode"), statistics=first.result.statistics)
    for mine, theirs in zip(first.result.learned, again.result.learned, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_model_in_memory_needs_a_tokenizer_or_ids(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
    with pytest.raises(UsageError, match="tokenizer"):
        lrquant.quantize(model, recipe())
    quantized = lrquant.quantize(model, recipe(epochs=0), calibration=[torch.arange(32)[None]] * 3)
    assert quantized.model is model
    assert quantized.recipe.nsamples == 3


def test_quantizing_twice_is_refused(tiny: Path, tmp_path: Path) -> None:
    lrquant.quantize(str(tiny), recipe(method="rtn"), save_dir=tmp_path / "out")
    with pytest.raises(UsageError, match="already quantized"):
        lrquant.quantize(str(tmp_path / "out"), recipe())


def test_all_zero_channels_and_constant_tokens(tiny: Path) -> None:
    """A dead input channel has no range; its scale stops at the floor and everything stays finite."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[:8] = 0
        model.model.layers[0].mlp.up_proj.weight[5] = 0
    quantized = lrquant.quantize(model, recipe(abits=8), calibration=[torch.full((1, 32), 7)] * 2)
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.full((1, 16), 7)).logits).all()
    assert all(math.isfinite(record.final_loss) for record in quantized.records)


@pytest.mark.parametrize(("wbits", "abits"), [(8, 8), (4, 8)])
def test_eight_bit_activations_in_bfloat16_are_finite(tiny: Path, wbits: int, abits: int) -> None:
    quantized = lrquant.quantize(str(tiny), recipe(wbits=wbits, abits=abits, dtype="bfloat16", epochs=2))
    assert quantized.model.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.isfinite(quantized.model(input_ids=torch.arange(48)[None]).logits).all()
    assert all(record.recoveries == 0 for record in quantized.records)


def test_an_early_stop_leaves_a_block_whose_loss_has_flattened(tiny: Path) -> None:
    # After the second epoch of a constant rate, no epoch halves the loss.
    stopped = lrquant.quantize(str(tiny), recipe(epochs=12, early_stop=0.5))
    for record in stopped.records:
        assert record.epochs_left > 0
        assert len(record.epoch_losses) + record.epochs_left == 12
        assert record.final_loss <= record.initial_loss
        assert record.seconds_saved > 0
    assert any("converged early" in note for note in stopped.notes)
    patient = lrquant.quantize(str(tiny), recipe(epochs=4))
    assert all(len(record.epoch_losses) == 4 and not record.epochs_left for record in patient.records)


def test_when_a_loss_has_flattened() -> None:
    assert not has_flattened([1.0, 0.9], 0.5)  # too early to say
    assert not has_flattened([1.0, 0.9, 0.4], 0.5)
    assert has_flattened([1.0, 0.9, 0.6], 0.5)
    assert not has_flattened([1.0, 1.0, 1.0], 0.0)
