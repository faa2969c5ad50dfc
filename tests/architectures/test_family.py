"""Families by model type, models of types that nobody declared, and how little a declaration takes."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import lrquant.architectures.families
from lrquant.architectures import family_names, family_of
from lrquant.errors import UsageError
from tests.models import MODELS, build, config_of

SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_declarations_name_what_a_block_has(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = build(name)
    family = family_of(model)
    assert config_of(name).model_type in family.model_types
    assert not caplog.records
    blocks = model.get_submodule(family.blocks)
    assert len(blocks) == 2
    names = [equivalence.name for equivalence in family.equivalences(model.config)]
    assert len(names) == len(set(names))  # learnables are stored under them
    for equivalence in family.equivalences(model.config):
        for part in equivalence.bias_slots:
            blocks[0].get_submodule(part)


def test_blocks_of_an_unknown_type_are_found_and_a_warning_says_what_is_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmo2", **SMALL))
    with caplog.at_level(logging.WARNING, "lrquant"):
        family = family_of(model)
    assert family.blocks == "model.layers"
    assert tuple(family.equivalences(model.config)) == ()
    assert [record.getMessage() for record in caplog.records if record.name.startswith("lrquant")] == [
        "Model type 'olmo2' is not known: its blocks were found at model.layers; weight clipping only, no smoothing."
    ]


def test_lists_within_blocks_are_not_mistaken_for_them() -> None:
    block = nn.ModuleDict({"heads": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    model = nn.ModuleDict({"trunk": nn.ModuleList([block])})
    model.config = SimpleNamespace(model_type="mine")
    assert family_of(model).blocks == "trunk"


def test_a_model_without_blocks_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.LayerNorm(2), nn.LayerNorm(2)]))
    model.config = SimpleNamespace(model_type="mine")
    with pytest.raises(UsageError, match=rf"^model type 'mine' is not known.*none.*{', '.join(family_names())}"):
        family_of(model)


def test_two_lists_of_blocks_are_named_and_refused() -> None:
    config = AutoConfig.for_model(
        "t5", vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    with pytest.raises(UsageError, match=r"'t5' is not known.*encoder\.block, decoder\.block"):
        family_of(AutoModel.from_config(config))


def test_a_family_takes_under_forty_lines() -> None:
    folder = Path(lrquant.architectures.families.__path__[0])
    families = [path for path in folder.glob("*.py") if path.stem != "__init__"]
    lengths = {path.name: len(path.read_text().splitlines()) for path in families}
    assert len(lengths) >= 9
    assert max(lengths.values()) < 40, lengths
