"""A quantized key-value cache: scales under the names that loaders expect, and the answers of the model in memory."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lrquant
from lrquant import Recipe
from lrquant.cli.info import describe
from lrquant.errors import UsageError
from lrquant.reconstruction.callbacks import Callback
from tests.export.test_round_trip import logits
from tests.tiny import SETTINGS, write_tiny

W4 = {"wbits": 4, "abits": 16, "quantize_attention": False}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(("numbers", "largest"), [("fp8", 448), ("int8", 127.5)])
def test_load_computes_what_the_model_in_memory_does(numbers: str, largest: float, tiny: Path, tmp_path: Path) -> None:
    recipe = Recipe.preset("lrquant", **W4, **SETTINGS, kv_cache=numbers, dtype="bfloat16", let_lr=1e-3)
    quantized = lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "out", keep_model=True)
    assert torch.equal(logits(lrquant.load(str(tmp_path / "out"), torch.bfloat16)), logits(quantized.model))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for block in (0, 1):
        for part in "kv":
            scale = tensors[f"model.layers.{block}.self_attn.{part}_scale"]
            assert (scale.shape, scale.dtype) == ((1,), torch.bfloat16)
            assert 0.01 < scale * largest < 1000
    scheme = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["type"]) == (8, numbers.rstrip("8").replace("fp", "float"))
    assert (scheme["strategy"], scheme["dynamic"], scheme["symmetric"]) == ("tensor", False, True)
    facts = describe(tmp_path / "out")
    assert facts.format == recipe.format_name == f"W4A16 KV{numbers.upper()}"
    assert facts.attention.startswith("keys and values in the cache: ")
    without = Recipe.parse(recipe.model_dump() | {"kv_cache": None})
    full = lrquant.quantize(str(tiny), without, keep_model=True)
    assert not torch.equal(logits(full.model), logits(quantized.model))


def test_generation_reads_the_rounded_cache(tiny: Path, tmp_path: Path) -> None:
    """Token by token as all at once."""
    recipe = Recipe.preset("rtn", **W4, **SETTINGS, kv_cache="fp8")
    lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "out")
    model = lrquant.load(str(tmp_path / "out"))
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        together = model(ids).logits[0, -1]
        first = model(ids[:, :6], use_cache=True)
        for place in range(6, 12):
            first = model(ids[:, place : place + 1], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(first.logits[0, -1], together, rtol=1e-4, atol=1e-4)


def test_weights_may_stay_as_they_are(tiny: Path, tmp_path: Path) -> None:
    recipe = Recipe.preset("lrquant", wbits=16, abits=16, quantize_attention=False, kv_cache="fp8", **SETTINGS)
    quantized = lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "out", keep_model=True)
    assert torch.equal(logits(lrquant.load(str(tmp_path / "out"))), logits(quantized.model))
    assert recipe.format_name == "W16A16 KVFP8"


def test_an_interrupted_run_ends_in_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    class Stop(Callback):
        def block_done(self, record: object) -> None:
            raise Interrupted

    recipe = Recipe.preset("lrquant", **W4, **SETTINGS, kv_cache="fp8")
    lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "whole")
    with pytest.raises(Interrupted):
        lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "cut", callback=Stop())
    lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "cut")
    one, other = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "cut"))
    assert one == other


def test_what_cannot_be(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="attention inputs are already quantized"):
        Recipe.preset("lrquant", wbits=4, abits=4, kv_cache="fp8")
    with pytest.raises(UsageError, match="kv_cache = 'fp4': there are "):
        Recipe.preset("lrquant", **W4, kv_cache="fp4")
    with pytest.raises(UsageError, match="kv_cache = fp8: only blocks of language models have a cache"):
        lrquant.quantize("zoo:vit", Recipe.preset("rtn", **W4, kv_cache="fp8", nsamples=2, calibration="zoo:shapes"))
    falcon = write_tiny(tmp_path / "falcon", "falcon")  # calls its attention itself
    with pytest.raises(UsageError, match="this family's attention cannot be quantized"):
        lrquant.quantize(str(falcon), Recipe.preset("rtn", **W4, **SETTINGS, kv_cache="fp8"), save_dir=tmp_path / "out")
