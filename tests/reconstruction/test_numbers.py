"""Numbers that go wrong have a defined outcome: refused by name, or carried through without a NaN."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lrquant
from lrquant import LrquantError, Recipe
from lrquant.reconstruction import block_optimizer as learning
from tests.tiny import write_tiny

IDS = [torch.arange(first, first + 32)[None] for first in (100, 300, 500, 700)]


def recipe(**changes: Any) -> Recipe:
    return Recipe.preset(**{"method": "lrquant", "wbits": 4, "abits": 8, "epochs": 2, "batch_size": 2, **changes})


def changed(tmp_path: Path, change: Callable[[Any], None], dtype: torch.dtype = torch.float32) -> Path:
    """A tiny model whose weights were tampered with."""
    folder = write_tiny(tmp_path / "tiny", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    return folder


def zero_embeddings(model: Any) -> None:
    model.model.embed_tokens.weight.zero_()


def test_activations_that_overflow_are_refused_by_block(tmp_path: Path) -> None:
    tiny = changed(tmp_path, lambda model: model.model.layers[1].mlp.down_proj.weight.fill_(3e38))
    with pytest.raises(LrquantError, match="block 1 gives NaN or infinite outputs in full precision") as failed:
        lrquant.quantize(str(tiny), recipe(), calibration=IDS, save_dir=tmp_path / "out")
    assert "1 finished block is kept" in str(failed.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["rtn", "smoothquant", "omniquant", "lrquant", "lrquant-max"])
def test_blocks_that_answer_zero(method: str, tmp_path: Path) -> None:
    """Then every norm and cosine is 0/0. RMSNorm of zero is zero, so every block of this model answers zero."""
    tiny = changed(tmp_path, zero_embeddings)
    rtn = {} if method in ("rtn", "smoothquant") else {"epochs": 2}
    result = lrquant.quantize(str(tiny), Recipe.preset(method, abits=8, batch_size=2, **rtn), calibration=IDS)
    assert all(math.isfinite(record.final_loss) and math.isfinite(record.cosine) for record in result.records)
    assert all(torch.isfinite(parameter).all() for parameter in result.model.parameters())
    assert (result.model(input_ids=IDS[0]).logits == 0).all()


def test_gradients_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finite loss with an infinite slope: the block comes back to where it began, and says so."""
    honest = learning.terms

    def steep(*arguments: Any) -> Any:
        squared, direction = honest(*arguments)
        return squared + (squared - squared.detach()).abs().sqrt(), direction  # √0 has an infinite slope

    monkeypatch.setattr(learning, "terms", steep)
    result = lrquant.quantize(str(write_tiny(tmp_path / "tiny")), recipe(epochs=8), calibration=IDS)
    assert all(record.recoveries > 0 and record.final_loss <= record.initial_loss for record in result.records)
    assert all(torch.isfinite(parameter).all() for parameter in result.model.parameters())
    assert any("non-finite" in note for note in result.notes)


def too_large_for_float16(model: Any) -> None:
    model.model.layers[1].post_attention_layernorm.weight.fill_(6e4)
    model.model.layers[1].mlp.up_proj.weight.fill_(100.0)[0] = -100.0


def test_what_float16_cannot_hold_is_refused_and_bfloat16_holds_it(tmp_path: Path) -> None:
    """Smoothing would make weights of 1e6; float16 ends at 65504."""
    tiny = changed(tmp_path, too_large_for_float16, torch.float16)
    with pytest.raises(LrquantError, match=r"model\.layers\.1: .* float16") as failed:
        lrquant.quantize(str(tiny), recipe(), calibration=IDS, save_dir=tmp_path / "out")
    assert "1 finished block is kept" in str(failed.value)
    assert not (tmp_path / "out").exists()
    wide = AutoModelForCausalLM.from_pretrained(tiny, dtype="bfloat16")
    wide.save_pretrained(tmp_path / "wide")
    (tmp_path / "wide" / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    (tmp_path / "wide" / "tokenizer_config.json").write_bytes((tiny / "tokenizer_config.json").read_bytes())
    result = lrquant.quantize(str(tmp_path / "wide"), recipe(), calibration=IDS, save_dir=tmp_path / "out2")
    assert torch.isfinite(result.model(input_ids=IDS[0]).logits).all()


@pytest.mark.parametrize(("wbits", "abits"), [(8, 8), (4, 8)])
@pytest.mark.parametrize("method", ["smoothquant", "lrquant", "lrquant+"])
def test_large_activations_in_bfloat16_never_end_in_nan(wbits: int, abits: int, method: str, tmp_path: Path) -> None:
    """Outliers a thousand times the rest, as large language models have them."""

    def outliers(model: Any) -> None:
        for layer in model.model.layers:
            layer.input_layernorm.weight[3] = 1000.0
            layer.post_attention_layernorm.weight[7] = -1000.0

    tiny = changed(tmp_path, outliers, torch.bfloat16)
    result = (
        lrquant.quantize(
            str(tiny), Recipe.preset(method, wbits=wbits, abits=abits, dtype="bfloat16", batch_size=2), calibration=IDS
        )
        if method == "smoothquant"
        else lrquant.quantize(
            str(tiny), recipe(method=method, wbits=wbits, abits=abits, dtype="bfloat16"), calibration=IDS
        )
    )
    assert all(math.isfinite(record.final_loss) for record in result.records)
    assert torch.isfinite(result.model(input_ids=IDS[0]).logits).all()
