"""Checkpoints of mixtures of experts: plain transformers reads them where it can, and with lrquant everywhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

import lrquant
from lrquant import Recipe
from lrquant.architectures.experts import names_in_files
from lrquant.architectures.targets import expose_linears
from tests import mixtures

IDS = list(torch.arange(5, 133).view(4, 1, 32))
PACKED = {"wbits": 4, "abits": 16, "group_size": 32, "symmetric": True}
W4A4 = {"wbits": 4, "abits": 4}
# (model, format, whether plain transformers loads it)
CASES = [
    ("mixtral", PACKED, True),
    ("deepseek_v3", PACKED, True),
    ("gpt_oss", PACKED, False),
    ("llama4", PACKED, True),
    ("qwen2_moe", W4A4, False),
    ("deepseek_v3", W4A4, False),  # its latent attention gives a linear four dimensions
    ("gpt_oss", W4A4, False),
    ("llama4", W4A4, True),
    ("gpt2", W4A4, False),
]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS[0], use_cache=False).logits


@pytest.mark.parametrize(("name", "numbers", "by_itself"), CASES)
def test_every_loader_gives_the_same_answers(
    name: str, numbers: dict[str, Any], by_itself: bool, tmp_path: Path
) -> None:
    recipe = Recipe.preset("rtn", **numbers)
    quantized = lrquant.quantize(mixtures.build(name), recipe, IDS, save_dir=tmp_path / "out")
    kept = logits(quantized.model)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = logits(lrquant.load(str(tmp_path / "out")))
    assert torch.allclose(ours, kept, atol=1e-5)
    if numbers is PACKED:  # else plain transformers leaves queries, keys and values in floating point
        assert torch.allclose(logits(plain), kept, atol=1e-5)
    assert not torch.allclose(kept, logits(mixtures.build(name)), atol=1e-2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == ("compressed-tensors" if by_itself else "lrquant")
    assert any("import lrquant" in note for note in quantized.notes) != by_itself
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    if name == "mixtral":
        assert "model.layers.0.block_sparse_moe.experts.0.w2.weight_packed" in stored


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mixtral", ("block_sparse_moe.experts.3.w1", "block_sparse_moe.experts.3.w3")),
        ("qwen3_moe", ("mlp.experts.3.gate_proj", "mlp.experts.3.up_proj")),
        ("gpt_oss", None),  # fused in its checkpoints
    ],
)
def test_names_are_those_of_the_familys_checkpoints(name: str, expected: tuple[str, str] | None) -> None:
    model = mixtures.build(name)
    expose_linears(model)
    names = names_in_files(model)
    if expected is None:
        assert not names
        return
    found = tuple(names[f"model.layers.1.mlp.experts.3.{part}"] for part in ("gate_proj", "up_proj"))
    assert found == tuple(f"model.layers.1.{part}" for part in expected)
