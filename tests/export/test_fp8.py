"""FP8 on disk: the library's own layout, the model in memory bit for bit, calibrated scales, blocks, resuming."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lrquant
from lrquant import Recipe
from lrquant.cli.info import describe
from lrquant.errors import UsageError
from lrquant.reconstruction.callbacks import Callback
from tests.export.test_round_trip import logits
from tests.tiny import SETTINGS, write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Linears have 128 and 256 inputs, which blocks of 128 divide; keys and values have half a block of rows."""
    return write_tiny(tmp_path_factory.mktemp("tiny"), hidden_size=128, intermediate_size=256)


# Bits of a weight: a scale of 16 bits per channel (128 or 256 weights), per block of 128 × 128 or less, or 8 per 32.
BITS = {
    "fp8": (8.06, 8.13),
    "fp8a16": (8.06, 8.13),
    "fp8-static": (8.06, 8.13),
    "fp8-block": (8.0009, 8.003),
    "mxfp8": (8.25, 8.25),
    "mxfp8a16": (8.25, 8.25),
    "w4a8-fp8": (4.125, 4.14),
}
LAYOUT = {
    "fp8": "float-quantized",
    "fp8a16": "naive-quantized",
    "fp8-static": "float-quantized",
    "fp8-block": "float-quantized",
    "mxfp8": "mxfp8-quantized",
    "mxfp8a16": "mxfp8-quantized",
    "w4a8-fp8": "pack-quantized",
}


@pytest.mark.parametrize("name", BITS)
def test_the_checkpoint_computes_what_the_model_in_memory_does(name: str, tiny: Path, tmp_path: Path) -> None:
    """In bfloat16, which plain transformers takes from the configuration, to the last bit; and in lrquant.load."""
    recipe = Recipe.preset("lrquant-max", format=name, **SETTINGS, dtype="bfloat16", let_lr=1e-3, rounding_lr=0.02)
    quantized = lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "out", keep_model=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype == torch.bfloat16
    assert torch.equal(logits(plain), logits(quantized.model))
    assert torch.equal(logits(lrquant.load(str(tmp_path / "out"), torch.bfloat16)), logits(quantized.model))
    full = AutoModelForCausalLM.from_pretrained(tiny)
    assert not torch.equal(logits(full), logits(plain))
    facts = describe(tmp_path / "out")
    least, most = BITS[name]
    assert least <= facts.bits_per_weight <= most
    assert facts.bits_per_weight == pytest.approx(quantized.sizes.bits_per_weight)
    assert facts.format == recipe.format_name
    assert facts.container == f"compressed-tensors {LAYOUT[name]}"


@pytest.mark.parametrize("name", ["fp8-static", "fp8-block", "mxfp8", "w4a8-fp8"])
def test_load_takes_any_precision(name: str, tiny: Path, tmp_path: Path) -> None:
    recipe = Recipe.preset("rtn", format=name, **SETTINGS, dtype="float32")
    quantized = lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "out", keep_model=True)
    assert torch.equal(logits(lrquant.load(str(tmp_path / "out"))), logits(quantized.model))


def test_what_lies_in_the_file(tiny: Path, tmp_path: Path) -> None:
    """Names and types that transformers and vLLM read; linears that runtimes fuse have one scale for their input."""
    lrquant.quantize(str(tiny), Recipe.preset("rtn", format="fp8-static", **SETTINGS), save_dir=tmp_path / "static")
    tensors = load_file(tmp_path / "static" / "model.safetensors")
    up = "model.layers.0.mlp.up_proj"
    assert tensors[f"{up}.weight"].dtype == torch.float8_e4m3fn
    assert (tensors[f"{up}.weight_scale"].shape, tensors[f"{up}.weight_scale"].dtype) == ((256, 1), torch.bfloat16)
    assert tensors[f"{up}.input_scale"].shape == (1,)
    same = [float(tensors[f"model.layers.0.self_attn.{linear}_proj.input_scale"]) for linear in "qkv"]
    assert same[0] == same[1] == same[2] > 0
    lrquant.quantize(str(tiny), Recipe.preset("rtn", format="fp8-block", **SETTINGS), save_dir=tmp_path / "block")
    tensors = load_file(tmp_path / "block" / "model.safetensors")
    assert tensors[f"{up}.weight_scale"].shape == (2, 1)
    assert tensors["model.layers.0.self_attn.k_proj.weight_scale"].shape == (1, 1)  # of 64 rows
    assert not any(name.endswith("input_scale") for name in tensors)
    assert describe(tmp_path / "block").weights == "float8, symmetric, per block of 128 × 128"


@pytest.mark.parametrize("name", ["fp8-static", "fp8-block"])
def test_an_interrupted_run_ends_in_the_same_bytes(name: str, tiny: Path, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    class Stop(Callback):
        def block_done(self, record: object) -> None:
            raise Interrupted

    recipe = Recipe.preset("lrquant", format=name, **SETTINGS)
    lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "whole")
    with pytest.raises(Interrupted):
        lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "cut", callback=Stop())
    lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "cut")
    one, other = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "cut"))
    assert one == other


def test_adaptation_keeps_the_layout(tiny: Path, tmp_path: Path) -> None:
    recipe = Recipe.preset("lrquant", format="fp8-static", **SETTINGS)
    lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "out")
    rows = [torch.randint(5, 200, (1, 32), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    lrquant.adapt(tmp_path / "out", tiny, rows, save_dir=tmp_path / "adapted", epochs=1)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "adapted"))
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert torch.isfinite(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapted"))).all()


def test_channels_that_blocks_do_not_divide_are_refused(tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path / "tiny")
    with pytest.raises(UsageError, match="group size 128 does not divide the 64 input channels of"):
        lrquant.quantize(str(tiny), Recipe.preset("rtn", format="fp8-block", **SETTINGS), save_dir=tmp_path / "out")
