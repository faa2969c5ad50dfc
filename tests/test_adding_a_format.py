"""docs/adding-a-format.md is followed to the letter: its file makes a format that is learned, packed and read back."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.config import CompressionFormat
from transformers import AutoModelForCausalLM

import lrquant
from lrquant import Recipe
from lrquant.cli.info import describe
from lrquant.errors import UsageError
from lrquant.formats import presets, quantize_weight
from tests.export.test_round_trip import logits
from tests.tiny import SETTINGS, write_tiny

DOCUMENT = Path(__file__).parent.parent / "docs" / "adding-a-format.md"
pytestmark = pytest.mark.skipif(
    not hasattr(CompressionFormat, "mxfp6_pack_quantized"), reason="this compressed-tensors has no packer for it"
)


@pytest.fixture
def defined() -> Iterator[dict[str, Any]]:
    """What the document's file defines; the table forgets it afterwards."""
    tables: tuple[Any, ...] = (presets.TABLE, presets.FORMATS, presets._ELEMENTS)
    before, rules = [dict(table) for table in tables], list(presets._SCALES)
    code = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S)[0]
    assert len(code.splitlines()) < 60
    found: dict[str, Any] = {}
    try:
        exec(code, found)
        yield found
    finally:
        presets._SCALES[:] = rules
        for table, old in zip(tables, before, strict=True):
            table.clear()
            table.update(old)


def test_its_numbers_are_e2m3(defined: dict[str, Any]) -> None:
    format = defined["MXFP6"]
    eighths = torch.tensor([*range(16), *range(16, 32, 2), *range(32, 61, 4)]) / 8  # 32 magnitudes
    numbers = torch.cat([eighths, -eighths])
    assert torch.equal(format.elements.nearest(numbers), numbers)
    assert torch.equal(format.elements.decode(format.elements.encode(numbers)), numbers)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    stored = quantize_weight(weight, format)
    assert set(stored.steps().unique().tolist()) <= set(numbers.tolist())
    assert (stored.dequantized() - weight).abs().max() < weight.abs().max() / 16


def test_a_model_in_it_is_learned_packed_and_read_by_plain_transformers(
    defined: dict[str, Any], tmp_path: Path
) -> None:
    tiny = write_tiny(tmp_path / "tiny")
    recipe = Recipe.preset("lrquant-max", format="mxfp6", **SETTINGS, dtype="bfloat16")
    quantized = lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "out", keep_model=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(plain), logits(quantized.model))
    facts = describe(tmp_path / "out")
    assert facts.bits_per_weight == quantized.sizes.bits_per_weight == 6.25  # six bits, and a byte for 32 of them
    assert facts.format == recipe.format_name == "MXFP6"


def test_names_and_elements_are_taken_once(defined: dict[str, Any]) -> None:
    row = presets.TABLE["mxfp6"]
    with pytest.raises(UsageError, match="format 'mxfp6': the name is taken"):
        lrquant.formats.register(row)


def test_without_it_its_checkpoints_are_refused_not_mistaken() -> None:
    from compressed_tensors.quantization import preset_name_to_scheme

    with pytest.raises(UsageError, match="number format float6, group of 32: not known; there are nvfp4, "):
        presets.format_of(preset_name_to_scheme("MXFP6A16", []).weights)
