"""docs/adding-a-model.md is followed to the letter: its file makes a new family exact."""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lrquant.architectures import Family
from lrquant.transforms import materialize, reparameterize
from lrquant.transforms.statistics import ChannelStatistics
from tests.models import InDouble

DOCUMENT = Path(__file__).parent.parent / "docs" / "adding-a-model.md"


@torch.no_grad()
def test_the_documents_family_leaves_the_function_as_it_is() -> None:
    code = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S)[0]
    assert len(code.splitlines()) < 40
    defined: dict[str, Any] = {}
    exec(code, defined)
    family: Family = defined["FAMILY"]

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family.model_types[0], vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    ids = torch.arange(20)[None]
    with InDouble():
        before = model(ids).logits
        for block in model.get_submodule(family.blocks):
            params = dict(block.named_parameters())
            learnables = {}
            for equivalence in family.equivalences(config):
                seen = {
                    name: ChannelStatistics(
                        torch.rand(part.in_features).double(), torch.zeros(part.in_features).double()
                    )
                    for name, part in block.named_modules()
                    if isinstance(part, torch.nn.Linear)
                }
                start = equivalence.initial(params, seen, "log", 0.5)["scale"].double()
                learnables[f"{equivalence.name}.scale"] = torch.randn_like(start).exp()
            changed = materialize(params, reparameterize(params, family.equivalences(config), learnables))
            assert sum(not torch.equal(changed[name], params[name]) for name in params) >= 9
            for name, value in changed.items():
                params[name].copy_(value)
        after = model(ids).logits
    assert (after - before).abs().max() < 1e-9 * before.abs().max()
