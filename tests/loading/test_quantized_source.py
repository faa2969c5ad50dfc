"""Sources that are quantized already: floats are dequantized, everything else is refused before it is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrquant import UsageError
from lrquant.loading.pretrained import load_config, load_model
from lrquant.loading.quantized_source import dequantizing, source_note
from tests.tiny import write_tiny

LARGEST = 448.0  # of float8 e4m3
GROUP: dict[str, Any] = {"targets": ["Linear"], "input_activations": None, "output_activations": None}


def weights(kind: str, bits: int) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": "channel", "symmetric": True, "dynamic": False}


def compressed(kind: str, bits: int) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if kind == "float" else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": GROUP | {"weights": weights(kind, bits)}},
    }


def by_rows(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / LARGEST
    return {"": (weight / scale).to(torch.float8_e4m3fn), "_scale": scale.bfloat16()}


def by_tiles(weight: Tensor) -> dict[str, Tensor]:
    tiles = weight.view(weight.shape[0] // 32, 32, -1, 32)
    scale = tiles.abs().amax((1, 3)) / LARGEST
    rounded = (tiles / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
    return {"": rounded, "_scale_inv": scale}


FLOATS = {
    "compressed-tensors": (by_rows, compressed("float", 8)),
    "fp8": (by_tiles, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}),
}
REFUSED = {
    "compressed-tensors, 4-bit int": compressed("int", 4),
    "gptq, 4 bits": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq, 4 bits": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
}


def configured(folder: Path, quantization: dict[str, Any]) -> Path:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": quantization}))
    return folder


@pytest.mark.parametrize("kind", FLOATS)
def test_floats_are_dequantized(kind: str, tmp_path: Path) -> None:
    pack, quantization = FLOATS[kind]
    tiny = write_tiny(tmp_path / "tiny")
    before = load_file(tiny / "model.safetensors")
    packed = dict(before)
    for name in [name for name in before if "_proj" in name]:
        weight = packed.pop(name).float()
        packed |= {f"{name}{part}": tensor for part, tensor in pack(weight).items()}
    save_file(packed, tiny / "model.safetensors", {"format": "pt"})
    configured(tiny, quantization)
    model = load_model(str(tiny), torch.float32, original=True)
    after = model.state_dict()
    for name, tensor in before.items():
        assert torch.allclose(after[name], tensor.float(), rtol=0.08, atol=1e-3), name
    assert getattr(model.config, "quantization_config", None) is None
    assert str(source_note(load_config(str(tiny)))).endswith("it was dequantized before the run.")


@pytest.mark.parametrize("kind", REFUSED)
def test_the_rest_is_refused_by_its_configuration(kind: str, tmp_path: Path) -> None:
    tiny = configured(write_tiny(tmp_path / "tiny"), REFUSED[kind])
    with pytest.raises(UsageError, match=rf"already quantized \({kind}\); take the full-precision original"):
        dequantizing(load_config(str(tiny)), "tiny")


def test_a_plain_model_has_nothing_to_undo(tmp_path: Path) -> None:
    config = load_config(str(write_tiny(tmp_path / "tiny")))
    assert dequantizing(config, "tiny") is None
    assert source_note(config) is None
