"""NVFP4 and MXFP4 on disk: the library's own packing, the model in memory bit for bit, and what runtimes fuse."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lrquant
from lrquant import Recipe
from lrquant.cli.info import describe
from lrquant.reconstruction.callbacks import Callback
from tests.export.test_round_trip import logits
from tests.tiny import SETTINGS, write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


# Four bits, and per group a byte; per tensor of at least 32·64 weights a scale of four bytes more.
BITS = {"nvfp4": (4.5, 4.516), "nvfp4a16": (4.5, 4.516), "mxfp4": (4.25, 4.25), "mxfp4a16": (4.25, 4.25)}


@pytest.mark.parametrize("name", BITS)
def test_the_checkpoint_computes_what_the_model_in_memory_does(name: str, tiny: Path, tmp_path: Path) -> None:
    """In bfloat16, which plain transformers takes from the configuration, to the last bit."""
    recipe = Recipe.preset("lrquant-max", format=name, **SETTINGS, dtype="bfloat16", let_lr=1e-3, rounding_lr=0.02)
    quantized = lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "out", keep_model=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype == torch.bfloat16
    assert torch.equal(logits(plain), logits(quantized.model))
    full = AutoModelForCausalLM.from_pretrained(tiny)
    assert not torch.equal(logits(full), logits(plain))
    facts = describe(tmp_path / "out")
    least, most = BITS[name]
    assert least <= facts.bits_per_weight <= most
    assert facts.bits_per_weight == quantized.sizes.bits_per_weight
    assert facts.format == recipe.format_name == name.upper()


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4a16"])
def test_load_takes_any_precision(name: str, tiny: Path, tmp_path: Path) -> None:
    recipe = Recipe.preset("rtn", format=name, **SETTINGS, dtype="float32")
    quantized = lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "out", keep_model=True)
    assert torch.equal(logits(lrquant.load(str(tmp_path / "out"))), logits(quantized.model))


def test_weights_that_runtimes_fuse_have_one_global_scale(tiny: Path, tmp_path: Path) -> None:
    lrquant.quantize(str(tiny), Recipe.preset("lrquant", format="nvfp4", **SETTINGS), save_dir=tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for block in (0, 1):
        for kind in ("weight", "input"):
            attention, mlp = (
                [float(tensors[f"model.layers.{block}.{linear}.{kind}_global_scale"]) for linear in linears]
                for linears in (
                    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
                    ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
                )
            )
            assert attention[0] == attention[1] == attention[2] != attention[3]
            assert mlp[0] == mlp[1] != mlp[2]
    assert tensors["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.float8_e4m3fn


def test_an_interrupted_run_ends_in_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    """The calibrated scales of inputs come back with the finished block."""

    class Interrupted(Exception):
        pass

    class Stop(Callback):
        def block_done(self, record: object) -> None:
            raise Interrupted

    recipe = Recipe.preset("lrquant", format="nvfp4", **SETTINGS)
    lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "whole")
    with pytest.raises(Interrupted):
        lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "cut", callback=Stop())
    lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "cut")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == other


def test_adaptation_keeps_the_layout(tiny: Path, tmp_path: Path) -> None:
    recipe = Recipe.preset("lrquant", format="nvfp4", **SETTINGS)
    lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "out")
    rows = [torch.randint(5, 200, (1, 32), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    lrquant.adapt(tmp_path / "out", tiny, rows, save_dir=tmp_path / "adapted", epochs=2)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "adapted"))
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert torch.isfinite(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapted"))).all()
