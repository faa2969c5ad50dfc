"""Rotated models on disk: ordinary checkpoints, unless something is computed at run time; then they say so."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.transform import TransformConfig, apply_transform_config
from transformers import AutoModelForCausalLM

import lrquant
from lrquant import Recipe
from lrquant.errors import Interrupted
from lrquant.transforms.online import BlockHadamard
from tests.resume.test_resume import Stops, contents
from tests.tiny import SETTINGS, write_tiny

IDS = torch.arange(5, 69)[None]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))  # its embeddings are tied


def recipe(*parts: str, **changes: Any) -> Recipe:
    settings = {"method": "lrquant", "wbits": 4, "abits": 4, "quantize_attention": False}
    return Recipe.preset(**{**settings, **SETTINGS, "rotate": parts, **changes})


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_what_folds_loads_with_plain_transformers(kind: str, tiny: Path, tmp_path: Path) -> None:
    quantized = lrquant.quantize(
        str(tiny), recipe("stream", "values", rotate_by=kind), [IDS], save_dir=tmp_path / "out", keep_model=True
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    assert torch.equal(logits(plain), logits(quantized.model))
    assert not torch.equal(plain.model.embed_tokens.weight, plain.lm_head.weight)
    assert not plain.config.tie_word_embeddings
    assert torch.equal(logits(lrquant.load(str(tmp_path / "out"))), logits(plain))


@pytest.mark.parametrize("parts", [("stream", "values"), ("stream", "values", "down")])
@pytest.mark.parametrize("model_type", ["llama", "llama-untied", "opt"])
def test_a_streamed_model_gives_the_same_bytes(model_type: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    special: dict[str, Any] = {"ffn_dim": 128, "word_embed_proj_dim": 64} if model_type == "opt" else {}
    tiny = write_tiny(
        tmp_path / "tiny", model_type.partition("-")[0], **special, tie_word_embeddings="untied" not in model_type
    )
    for name, keep in (("streamed", False), ("whole", True)):
        lrquant.quantize(str(tiny), recipe(*parts), calibration=[IDS], save_dir=tmp_path / name, keep_model=keep)
    assert contents(tmp_path / "streamed") == contents(tmp_path / "whole")


class TestTransformsAtRunTime:
    @pytest.fixture(scope="class")
    def saved(self, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
        folder = tmp_path_factory.mktemp("down") / "out"
        quantized = lrquant.quantize(str(tiny), recipe("down"), [IDS], save_dir=folder, keep_model=True)
        assert any("import lrquant" in note for note in quantized.notes)
        return folder, logits(quantized.model)

    def test_load_gives_the_model_in_memory(self, saved: tuple[Path, torch.Tensor]) -> None:
        assert torch.equal(logits(lrquant.load(str(saved[0]))), saved[1])

    def test_plain_transformers_refuses_it(self, saved: tuple[Path, torch.Tensor]) -> None:
        program = f"""
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({str(saved[0])!r})
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        assert done.returncode != 0
        assert "model type `lrquant`" in done.stderr

    def test_the_formats_own_package_applies_what_the_checkpoint_describes(
        self, saved: tuple[Path, torch.Tensor]
    ) -> None:
        """compressed-tensors, given the section as it stands, computes what lrquant computes."""
        section = json.loads((saved[0] / "config.json").read_text())["quantization_config"]["transform_config"]
        config = TransformConfig(**section)
        model = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleList()})})
        layers = model["model"]["layers"]
        layers.append(torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"down_proj": torch.nn.Linear(128, 64)})}))
        layers.append(torch.nn.Linear(128, 64))
        down, other = layers[0]["mlp"]["down_proj"], layers[1]
        x, before, weight = torch.randn(2, 3, 128), other.weight.clone(), down.weight.clone()
        expected, transform = down(x), BlockHadamard(128)
        apply_transform_config(model, config)
        seen: list[torch.Tensor] = []
        down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        assert torch.allclose(down(x), expected, atol=1e-4)
        assert torch.allclose(seen[0], transform(x), atol=1e-4)
        assert torch.allclose(down.weight, transform(weight), atol=1e-4)
        assert torch.equal(other.weight, before)


def test_an_untied_head_does_not_flatter_the_ratio(tiny: Path) -> None:
    sizes = [lrquant.quantize(str(tiny), recipe(*parts), [IDS]).sizes for parts in ((), ("stream",))]
    assert sizes[0].bf16_bytes == sizes[1].bf16_bytes
    assert sizes[0].checkpoint_bytes < sizes[1].checkpoint_bytes


def test_an_interrupted_run_goes_on_to_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    chosen = recipe("stream", "values", "down", seed=3)
    lrquant.quantize(str(tiny), chosen, [IDS], save_dir=tmp_path / "once")
    with pytest.raises(Interrupted, match="1 finished block is kept"):
        lrquant.quantize(str(tiny), chosen, [IDS], save_dir=tmp_path / "twice", callback=Stops(1))
    lrquant.quantize(str(tiny), chosen, [IDS], save_dir=tmp_path / "twice")
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")


def test_an_adapted_model_is_rotated_as_the_checkpoint_is(tiny: Path, tmp_path: Path) -> None:
    lrquant.quantize(str(tiny), recipe("stream", "values", "down"), [IDS], save_dir=tmp_path / "out")
    lrquant.adapt(tmp_path / "out", str(tiny), [IDS], save_dir=tmp_path / "adapted", epochs=1)
    full = logits(AutoModelForCausalLM.from_pretrained(tiny, dtype="float32"))
    for name in ("out", "adapted"):
        error = (logits(lrquant.load(str(tmp_path / name))) - full).abs().mean() / full.abs().mean()
        assert error < 0.5, name  # an unrotated block among rotated ones would answer at random: above 1
