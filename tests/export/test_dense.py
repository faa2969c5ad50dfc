"""Checkpoints in floating point, of the rounded weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lrquant
from lrquant.errors import UsageError
from lrquant.export.registry import export
from tests.tiny import write_tiny


@pytest.mark.parametrize(
    "settings",
    [{"wbits": 4, "abits": 16}, {"wbits": 4, "abits": 4, "quantize_attention": False}, {"format": "mxfp4a16"}],
    ids=["weights", "weights and activations", "floats"],
)
def test_the_weights_are_those_that_were_rounded_to(settings: dict[str, Any], tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", tie_word_embeddings="abits" not in settings)
    recipe = lrquant.Recipe.preset("rtn", calibration="zoo:pydoc", nsamples=2, seqlen=32, **settings)
    lrquant.quantize(str(model), recipe, save_dir=tmp_path / "w4")
    written = export(tmp_path / "w4", tmp_path / "dense", "dense", dtype="f32")
    assert "quantization_config" not in json.loads((written.path / "config.json").read_text())
    plain, info = AutoModelForCausalLM.from_pretrained(written.path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = lrquant.load(str(tmp_path / "w4")).state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert (written.path / "tokenizer.json").is_file()


def test_what_dense_weights_do_not_hold_is_refused(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model")
    recipe = lrquant.Recipe.preset(
        "rtn", calibration="zoo:pydoc", nsamples=2, seqlen=32, wbits=4, abits=4, rotate=("down",)
    )
    lrquant.quantize(str(model), recipe, save_dir=tmp_path / "w4")
    with pytest.raises(UsageError, match="needs lrquant to run"):
        export(tmp_path / "w4", tmp_path / "dense", "dense")
    with pytest.raises(UsageError, match="no such folder"):
        export(tmp_path / "missing", tmp_path / "dense", "dense")
    assert not list(tmp_path.glob("*dense*"))
