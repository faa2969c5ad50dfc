"""What a model's files hold: every tensor is read, carried over, named or refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import lrquant
from lrquant import LrquantError, Recipe
from lrquant.loading.offload import open_offloaded
from lrquant.loading.source_tensors import source_tensors
from tests.tiny import write_tiny

IDS = [torch.arange(first, first + 16)[None] for first in (0, 100)]
RTN = Recipe.preset("rtn", wbits=8, abits=16)
HEAD, EMBEDDING, UP = "lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"


def changed(folder: Path, change: Callable[[dict[str, Tensor]], Any], **config: Any) -> Path:
    """The model in `folder` with other tensors and configuration."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.float()(input_ids=IDS[1]).logits


@pytest.mark.parametrize("keep", [False, True], ids=["block by block", "whole"])
def test_a_head_of_its_own_stays_whatever_the_configuration_says(keep: bool, tmp_path: Path) -> None:
    """A merged adapter: the configuration ties the head to the embeddings, and the files contradict it."""
    tiny = changed(write_tiny(tmp_path / "tiny"), lambda t: t.update({HEAD: -t[EMBEDDING].flip(0)}))
    before = logits(AutoModelForCausalLM.from_pretrained(tiny))
    lrquant.quantize(str(tiny), RTN, calibration=IDS, save_dir=tmp_path / "out", keep_model=keep)
    after = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert torch.cosine_similarity(before, after, dim=-1).mean() > 0.99
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_equal_weights_stay_tied(tmp_path: Path) -> None:
    tiny = changed(write_tiny(tmp_path / "tiny"), lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    lrquant.quantize(str(tiny), RTN, calibration=IDS, save_dir=tmp_path / "out")
    assert HEAD not in load_file(tmp_path / "out" / "model.safetensors")


def test_a_tied_model_may_have_its_head_alone(tmp_path: Path) -> None:
    tiny = changed(write_tiny(tmp_path / "tiny"), lambda t: t.update({HEAD: t.pop(EMBEDDING)}))
    before = logits(AutoModelForCausalLM.from_pretrained(tiny))
    lrquant.quantize(str(tiny), RTN, calibration=IDS, save_dir=tmp_path / "out")
    after = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert torch.cosine_similarity(before, after, dim=-1).mean() > 0.99


REFUSED: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], dict[str, Any]]] = {
    "integers": (
        "model.layers.1.mlp.up_proj.weight is stored as I16",
        lambda t: t.update({UP: t[UP].view(torch.int16)}),
        {},
    ),
    "more blocks than the configuration": (
        "hold model.layers.1, but its configuration has only 1 blocks",
        lambda t: None,
        {"num_hidden_layers": 1},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_work(name: str, tmp_path: Path) -> None:
    says, change, config = REFUSED[name]
    tiny = changed(write_tiny(tmp_path / "tiny"), change, **config)
    with pytest.raises(LrquantError, match=says):
        open_offloaded(str(tiny), torch.float32, None, False)


def test_an_extra_head_is_carried_over_and_strange_weights_are_named(tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["mtp.layers.0.up_proj.weight"] = torch.ones(4, 4)
        tensors["mtp.norm.weight"] = torch.ones(4)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    tiny = changed(write_tiny(tmp_path / "tiny"), add)
    files = [tiny / "model.safetensors"]
    model = AutoModelForCausalLM.from_pretrained(tiny)
    found = source_tensors(model, files, "tiny")
    assert not found.carried
    assert "the result does not have them: model.layers.*.self_attn.q_proj.bias" in found.notes()[0]
    assert "mtp.layers.*.up_proj.weight, mtp.norm.weight" in found.notes()[0]
    assert "inv_freq" not in found.notes()[0]
    model._keys_to_ignore_on_load_unexpected = {r"^mtp\."}  # as classes whose family has such a head say
    found = source_tensors(model, files, "tiny")
    assert set(found.carried) == {"mtp.layers.0.up_proj.weight", "mtp.norm.weight"}


def test_blocks_that_predict_further_tokens_are_carried_over(tmp_path: Path) -> None:
    tiny = changed(write_tiny(tmp_path / "tiny"), lambda t: None, num_hidden_layers=1, num_nextn_predict_layers=1)
    found = source_tensors(AutoModelForCausalLM.from_pretrained(tiny), [tiny / "model.safetensors"], "tiny")
    assert len(found.carried) == 9
    assert all(name.startswith("model.layers.1.") for name in found.carried)
    read = {name: tensor for tensors in found.read_carried() for name, tensor in tensors.items()}
    assert torch.equal(read[UP], load_file(tiny / "model.safetensors")[UP])
