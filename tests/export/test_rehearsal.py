"""What plain transformers cannot load is known before the first block, and no result appears that it cannot load."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

import lrquant
from lrquant import LrquantError, Recipe, UsageError
from lrquant.entrypoints.estimate import estimate
from lrquant.export.compressed_tensors import needs_whole_weights
from lrquant.export.rehearsal import check_loads, rehearse
from lrquant.export.skeleton import fills_weights
from tests.tiny import write_tiny

IDS = [torch.arange(first, first + 32)[None] for first in (0, 100)]
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0,
}  # fmt: skip
FILLING: dict[str, tuple[str, dict[str, Any], str]] = {  # name → (model type, settings, path of a block)
    "falcon": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, "transformer.h.0"),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1}, "backbone.layers.0"),
    "gpt_bigcode": ("gpt_bigcode", {"n_embd": 64, "n_layer": 2, "n_head": 4}, "transformer.h.0"),
    "recurrent_gemma": ("recurrent_gemma", {"lru_width": 64, "num_key_value_heads": 1}, "model.layers.0"),
}
PLAIN = {"llama": ("llama", {}, "model.layers.0"), "opt": ("opt", {"ffn_dim": 128}, "model.decoder.layers.0")}


def skeleton(model_type: str, **changes: Any) -> Any:
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SMALL | changes))


def linears(model: nn.Module, path: str) -> tuple[str, ...]:
    block = model.get_submodule(path)
    return tuple(name for name, module in block.named_modules() if isinstance(module, nn.Linear))


@pytest.mark.parametrize("name", [*FILLING, *PLAIN])
def test_classes_that_fill_weights_are_found_by_trying(name: str) -> None:
    model_type, changes, path = (FILLING | PLAIN)[name]
    model = skeleton(model_type, **changes)
    assert fills_weights(model, path, linears(model, path)) is (name in FILLING)
    assert all(tensor.is_meta for tensor in model.parameters())


def test_trying_changes_no_weight() -> None:
    """And towers that filled their weights in releases of transformers that lrquant supports are stored whole."""
    config = CLIPVisionConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, image_size=32)
    model = CLIPVisionModel(config)
    path = "vision_model.encoder.layers.0" if hasattr(model, "vision_model") else "encoder.layers.0"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fills_weights(model, path, linears(model, path))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert needs_whole_weights(model, path)


@pytest.mark.parametrize("format", ["w4a16-g32", "nvfp4", "w8a8"])
@pytest.mark.parametrize("name", ["falcon", "llama"])
def test_a_rehearsal_knows_the_result_without_weights(name: str, format: str) -> None:
    model_type, changes, path = (FILLING | PLAIN)[name]
    model = skeleton(model_type, **changes)
    options = (
        {"wbits": 4, "abits": 16, "group_size": 32, "symmetric": True} if format == "w4a16-g32" else {"format": format}
    )
    recipe, blocks = Recipe.preset("rtn", **options), path[:-2]
    paths = [f"{blocks}.{index}" for index in range(2)]
    if (name, format) == ("falcon", "nvfp4"):  # no format of whole weights holds it
        with pytest.raises(UsageError, match="could not load the result"):
            rehearse(model, recipe, torch.bfloat16, paths=paths, name=name)
    else:
        assert rehearse(model, recipe, torch.bfloat16, paths=paths, name=name).keys() == set(paths)


@pytest.mark.parametrize("name", ["falcon", "mamba2"])
def test_their_results_load_with_plain_transformers(name: str, tmp_path: Path) -> None:
    model_type, changes, _ = FILLING[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SMALL | {"vocab_size": 256} | changes))
    options = {"wbits": 4, "abits": 16, "group_size": 32, "symmetric": True}
    quantized = lrquant.quantize(model, Recipe.preset("rtn", **options), calibration=IDS, save_dir=tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        expected = quantized.model(input_ids=IDS[0], use_cache=False).logits
        assert torch.equal(loaded(input_ids=IDS[0], use_cache=False).logits, expected)


def test_zero_points_of_few_rows_load(tmp_path: Path) -> None:
    """Eight rows of four bits are one packed row, which compressed-tensors cannot unpack."""
    tiny = write_tiny(tmp_path / "tiny", num_key_value_heads=1, head_dim=8)
    recipe = Recipe.preset("rtn", wbits=4, abits=16, group_size=32)
    lrquant.quantize(str(tiny), recipe, calibration=IDS, save_dir=tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(plain(input_ids=IDS[0]).logits, lrquant.load(str(tmp_path / "out"))(input_ids=IDS[0]).logits)


def test_what_is_missing_in_a_result_is_noticed(tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path / "tiny")
    lrquant.quantize(str(tiny), Recipe.preset("rtn"), calibration=IDS, save_dir=tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    check_loads(tmp_path / "out", AutoModelForCausalLM)
    tensors = load_file(weights)
    lost = tensors.pop("model.layers.1.mlp.up_proj.weight_packed")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(
        LrquantError, match=r"lacks 1 tensors, among them model\.layers\.1\.mlp\.up_proj\.weight_packed"
    ):
        check_loads(tmp_path / "out", AutoModelForCausalLM)
    more = {"model.layers.1.mlp.up_proj.weight_packed": lost, "mtp.weight": torch.ones(2, 2)}
    save_file(tensors | more, weights, {"format": "pt"})
    with pytest.raises(LrquantError, match=r"does not expect 1 tensors, among them mtp\.weight"):
        check_loads(tmp_path / "out", AutoModelForCausalLM)
    check_loads(tmp_path / "out", AutoModelForCausalLM, ["mtp.weight"])


def test_a_result_that_does_not_load_never_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = write_tiny(tmp_path / "tiny")

    def refuse(*arguments: Any, **options: Any) -> None:
        raise LrquantError("transformers cannot load the result (no)")

    monkeypatch.setattr("lrquant.entrypoints.quantize.check_loads", refuse)
    with pytest.raises(LrquantError, match="cannot load the result"):
        lrquant.quantize(str(tiny), Recipe.preset("rtn"), calibration=IDS, save_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def grow(tiny: Path) -> None:
    """A block that predicts one more token, behind the last."""
    values = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 1, "num_nextn_predict_layers": 1}))


def integers(tiny: Path) -> None:
    tensors = load_file(tiny / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].view(torch.int16)}, tiny / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("work", ["run", "whole", "dry run"])
def test_runs_and_dry_runs_refuse_the_same(work: str, tmp_path: Path) -> None:
    refused: dict[str, tuple[Callable[[Path], None], dict[str, Any], str]] = {
        "integers": (integers, {}, "is stored as I16"),
        "groups": (
            lambda tiny: None,
            {"group_size": 48},
            "group size 48 does not divide the 64 input channels of model.",
        ),
    }
    for name, (change, options, says) in refused.items():
        tiny = write_tiny(tmp_path / name)
        change(tiny)
        recipe = Recipe.preset("rtn", calibration="zoo:pydoc", nsamples=2, seqlen=32, **options)
        whole = {"save_dir": tmp_path / "out", "keep_model": work == "whole"}
        with pytest.raises(LrquantError, match=says):
            estimate(str(tiny), recipe) if work == "dry run" else lrquant.quantize(str(tiny), recipe, **whole)
        assert not (tmp_path / "out").exists()


def test_blocks_that_predict_further_tokens_are_in_the_result(tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path / "tiny")
    grow(tiny)
    quantized = lrquant.quantize(str(tiny), Recipe.preset("rtn"), calibration=IDS, save_dir=tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny, tmp_path / "out"))
    carried = [name for name in before if name.startswith("model.layers.1.")]
    assert all(torch.equal(before[name], after[name]) for name in carried)
    assert any(note.startswith("Copied without quantization") for note in quantized.notes)
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.1.mlp.up_proj" in ignored
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_share_is_everywhere(tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path / "tiny")
    recipe = Recipe.preset("rtn", calibration="zoo:pydoc", nsamples=2, seqlen=32)
    coverage = lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "out").coverage
    assert coverage is not None
    assert coverage == estimate(str(tiny), recipe).coverage
    assert coverage.summary() in (tmp_path / "out" / "README.md").read_text()
    assert (
        estimate(
            str(tiny), Recipe.preset("rtn", wbits=16, abits=8, nsamples=2, seqlen=32, calibration="zoo:pydoc")
        ).coverage
        is None
    )


def test_a_matrix_of_zeros_is_said(tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path / "tiny")
    tensors, name = load_file(tiny / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: torch.zeros_like(tensors[name])}, tiny / "model.safetensors", {"format": "pt"})
    quantized = lrquant.quantize(str(tiny), Recipe.preset("rtn"), calibration=IDS, save_dir=tmp_path / "out")
    assert f"All zero in the original, and so in the result: {name}." in quantized.notes


def test_norms_without_weights_are_learned_with(tmp_path: Path) -> None:
    """OLMo's first generation."""
    tiny = write_tiny(tmp_path / "tiny", "olmo", tie_word_embeddings=False)
    recipe = Recipe.preset("lrquant", wbits=4, abits=16, epochs=1, batch_size=2)
    lrquant.quantize(str(tiny), recipe, calibration=IDS, save_dir=tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
