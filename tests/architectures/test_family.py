"""Families by model type, models of types that nobody declared, and how little a declaration takes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import lrquant.architectures.families
from lrquant.architectures import FoundFamily, family_of
from lrquant.architectures.family import found_notes
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


def test_blocks_of_an_unknown_type_are_found_and_notes_say_what_was() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmo2", **SMALL))
    family = family_of(model)
    assert isinstance(family, FoundFamily)
    assert [stage.path for stage in family.stages(model)] == ["model.layers"]
    assert found_notes("olmo2", family.stages(model)) == [
        "Model type 'olmo2' has no family file; transformations of model.layers: found by analysis and verified: "
        "value->output, query*key, up->down."
    ]


def mine(module: nn.Module) -> nn.Module:
    module.config = SimpleNamespace(model_type="mine")
    return module


def test_lists_within_blocks_are_not_mistaken_for_them() -> None:
    block = nn.ModuleDict({"heads": nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))])})
    model = mine(nn.ModuleDict({"trunk": nn.ModuleList([block])}))
    assert [stage.path for stage in family_of(model).stages(model)] == ["trunk"]


def test_a_model_without_blocks_is_refused() -> None:
    model = mine(nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.LayerNorm(2), nn.LayerNorm(2)])))
    with pytest.raises(UsageError, match=r"^model type 'mine' is not known.*none"):
        family_of(model).stages(model)


def test_of_two_lists_the_one_that_holds_nearly_everything_is_taken() -> None:
    small, large = nn.ModuleList([nn.Sequential(nn.Linear(2, 2))]), nn.ModuleList([nn.Sequential(nn.Linear(9, 9))])
    model = mine(nn.ModuleDict({"mergers": small, "trunk": large}))
    assert [stage.path for stage in family_of(model).stages(model)] == ["trunk"]
    model = mine(nn.ModuleDict({"one": large, "other": nn.ModuleList([nn.Sequential(nn.Linear(9, 9))])}))
    with pytest.raises(UsageError, match="one, other"):
        family_of(model).stages(model)


def test_a_family_takes_under_forty_lines() -> None:
    folder = Path(lrquant.architectures.families.__path__[0])
    families = [path for path in folder.glob("*.py") if path.stem != "__init__"]
    lengths = {path.name: len(path.read_text().splitlines()) for path in families}
    assert len(lengths) >= 9
    assert max(lengths.values()) < 40, lengths
