"""docs/adding-a-learnable.md is followed to the letter: its file is learned, stored, and a start for another run."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.func import functional_call

import lrquant
from lrquant import Recipe
from lrquant.architectures import Family, family_of
from lrquant.reconstruction import learnables
from lrquant.reconstruction.block_parameters import quantized_parameters, transformed_parameters
from lrquant.reconstruction.fixed_parameters import BlockParameters
from lrquant.reconstruction.learnables import Start
from tests import models
from tests.tiny import SETTINGS, write_tiny

DOCUMENT = Path(__file__).parent.parent / "docs" / "adding-a-learnable.md"
NAME = "value_matrix"

pytestmark = pytest.mark.usefixtures("added")


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The document's file is in the folder of learnables."""
    code = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S)[0]
    assert len(code.splitlines()) < 60
    (tmp_path / f"{NAME}.py").write_text(code)
    monkeypatch.setattr(learnables, "__path__", [*learnables.__path__, str(tmp_path)])
    forget()
    yield
    sys.modules.pop(f"{learnables.__name__}.{NAME}", None)
    monkeypatch.undo()
    forget()


def forget() -> None:
    learnables.table.cache_clear()
    learnables._by_part.cache_clear()


@torch.no_grad()
def test_it_preserves_the_models_function() -> None:
    recipe = Recipe.preset("lrquant", wbits=4, abits=16)
    model = models.build("llama", torch.float32)
    family = family_of(model)
    assert isinstance(family, Family)
    ids = models.token_ids(2)
    before = model(ids, use_cache=False).logits
    generator = torch.Generator().manual_seed(0)
    changed: dict[str, torch.Tensor] = {}
    for index, block in enumerate(model.get_submodule(family.blocks)):
        fixed = BlockParameters.of(block, family.equivalences(model.config), recipe.scheme, torch.float32)
        matrices = learnables.learnable_of(f"x.{NAME}").start(fixed, Start(recipe))
        assert matrices
        plain = quantized_parameters(fixed, {}, torch.float32)
        same = quantized_parameters(fixed, matrices, torch.float32)
        assert all(torch.equal(plain[name], same[name]) for name in plain)  # at the start it changes nothing
        for matrix in matrices.values():
            matrix += 0.2 * torch.randn(matrix.shape, generator=generator)
        for name, value in transformed_parameters(fixed, matrices).items():
            changed[f"{family.blocks}.{index}.{name}"] = value
    after = functional_call(model, changed, (ids,), {"use_cache": False}).logits
    assert torch.allclose(after, before, atol=1e-4 * float(before.abs().max()))
    weights = [name for name in changed if not torch.equal(changed[name], model.get_parameter(name))]
    assert len(weights) == 4  # value and output projections of two blocks


def test_a_run_learns_and_stores_it_and_another_starts_from_it(tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path / "tiny")
    recipe = Recipe.preset("lrquant", wbits=3, abits=16, **SETTINGS)
    quantized = lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "out", keep_model=True)
    learned = quantized.result.learned[0]
    [matrix] = [tensor for name, tensor in learned.items() if name.endswith(NAME)]
    assert not torch.equal(matrix, torch.eye(matrix.shape[-1]).expand_as(matrix))
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        kept = quantized.model(ids, use_cache=False).logits
        assert torch.equal(lrquant.load(str(tmp_path / "out"))(ids, use_cache=False).logits, kept)
        again = lrquant.quantize(str(tiny), recipe.changed(epochs=0), start_from=quantized.result.learned)
        assert torch.equal(again.model(ids, use_cache=False).logits, kept)
