"""Test-time adaptation: the chosen blocks move towards the original on the test set, and nothing else moves."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import lrquant
from lrquant import Recipe, UsageError
from lrquant.entrypoints.adapt import ADAPTATION_FILE, copy_with_replacements, parse_blocks
from tests.tiny import SETTINGS, write_tiny

TEST = [torch.arange(start, start + 32)[None] for start in range(100, 180, 20)]  # token ids that calibration never saw
RECIPES = {
    "W4A4": Recipe.preset("lrquant", wbits=4, abits=4, **SETTINGS),
    "W2A16 g32, all of LRQuant+, shift": Recipe.preset(
        "lrquant+", wbits=2, abits=16, group_size=32, shift="on", **SETTINGS
    ),
    "W8A8": Recipe.preset("smoothquant", wbits=8, abits=8, **SETTINGS | {"epochs": 0}),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def quantized(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "w4a4"
    lrquant.quantize(str(tiny), RECIPES["W4A4"], save_dir=path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def logits(path: Path) -> torch.Tensor:
    model = lrquant.load(str(path))
    with torch.no_grad():
        return model(input_ids=torch.cat(TEST), use_cache=False).logits


def test_only_the_last_block_changes_and_it_answers_better(quantized: Path, tiny: Path, tmp_path: Path) -> None:
    before, answers = contents(quantized), logits(quantized)
    adapted = lrquant.adapt(quantized, tiny, TEST, save_dir=tmp_path / "out")
    (record,) = adapted.records
    assert (record.index, record.outcome) == (1, "learned")
    assert record.final_loss < record.initial_loss  # the initial loss is the checkpoint's own

    old, new = load_file(quantized / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert all(name.startswith("model.layers.1.") for name in changed)
    after = contents(tmp_path / "out")
    assert after.keys() - before.keys() == {ADAPTATION_FILE}
    assert {name for name in before if after[name] != before[name]} == {"model.safetensors", "SHA256SUMS", "README.md"}
    assert "adapted to" in (tmp_path / "out" / "README.md").read_text()
    assert not torch.equal(logits(tmp_path / "out"), answers)

    # The original is what it was, to the byte; so going back is loading it.
    assert contents(quantized) == before
    assert torch.equal(logits(quantized), answers)


def test_the_original_has_its_bytes_and_its_perplexity_afterwards(quantized: Path, tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "test.txt"
    text.write_text("Some sentences that the calibration has never seen. " * 40)
    before = contents(quantized), lrquant.evaluate(str(quantized), [str(text)], 32)
    lrquant.adapt(quantized, tiny, str(text), save_dir=tmp_path / "out", nsamples=4, epochs=1)
    assert (contents(quantized), lrquant.evaluate(str(quantized), [str(text)], 32)) == before


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_saved_is_what_was_learned(name: str, tiny: Path, tmp_path: Path) -> None:
    """Adapting twice to the same data, the second begins with the loss that the first ended at."""
    lrquant.quantize(str(tiny), RECIPES[name], save_dir=tmp_path / "q")
    first = lrquant.adapt(tmp_path / "q", tiny, TEST, save_dir=tmp_path / "once", blocks="all", epochs=1)
    second = lrquant.adapt(tmp_path / "once", tiny, TEST, save_dir=tmp_path / "twice", blocks="0", epochs=1)
    assert first.blocks == (0, 1)
    # Equal but for scales and norms, rounded to bfloat16 in the checkpoint and not while learning.
    assert second.records[0].initial_loss == pytest.approx(first.records[0].final_loss, rel=0.05)
    facts = yaml.safe_load((tmp_path / "once" / ADAPTATION_FILE).read_text())
    assert facts["blocks"] == [0, 1]
    assert Recipe.parse(facts["recipe"]) == first.recipe


def test_a_block_that_would_get_worse_stays(tiny: Path, tmp_path: Path) -> None:
    """Calibrated on the test set itself for 8 epochs, the checkpoint's blocks are better than one tiny step's."""
    recipe = Recipe.preset("lrquant", wbits=4, abits=4, **SETTINGS | {"epochs": 8})
    lrquant.quantize(str(tiny), recipe, TEST, save_dir=tmp_path / "q")
    recipe.changed(let_lr=1e-9, lwc_lr=1e-9).to_yaml(tmp_path / "q" / "recipe.yaml")
    adapted = lrquant.adapt(tmp_path / "q", tiny, TEST, save_dir=tmp_path / "out", blocks="0", epochs=1)
    assert adapted.records[0].outcome == "kept present"
    old, new = contents(tmp_path / "q"), contents(tmp_path / "out")
    assert old["model.safetensors"] == new["model.safetensors"]


def test_wrong_use_is_one_line(quantized: Path, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="not a checkpoint that lrquant wrote"):
        lrquant.adapt(tiny, tiny, TEST, save_dir=out)
    with pytest.raises(UsageError, match="full-precision original"):
        lrquant.adapt(quantized, quantized, TEST, save_dir=out)
    with pytest.raises(UsageError, match="blocks differ"):
        lrquant.adapt(quantized, write_tiny(tmp_path / "other", intermediate_size=64), TEST, save_dir=out)
    with pytest.raises(UsageError, match="blocks 0 to 1"):
        lrquant.adapt(quantized, tiny, TEST, save_dir=out, blocks="2")
    lrquant.quantize(str(tiny), Recipe.preset("rtn", **SETTINGS | {"epochs": 0}), save_dir=tmp_path / "rtn")
    with pytest.raises(UsageError, match="nothing to adapt"):
        lrquant.adapt(tmp_path / "rtn", tiny, TEST, save_dir=out)
    assert not out.exists()


def test_blocks_by_name_and_number() -> None:
    assert parse_blocks("last", 6) == (5,)
    assert parse_blocks("all", 3) == (0, 1, 2)
    assert parse_blocks("4,-1, 0,0", 6) == (0, 4, 5)
    with pytest.raises(UsageError, match="give last, all, or indices"):
        parse_blocks("first", 6)


def test_shards_without_replaced_tensors_are_copied_byte_for_byte(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "more").mkdir(parents=True)
    target.mkdir()
    save_file({"a": torch.zeros(3), "b": torch.ones(2)}, source / "1.safetensors", {"format": "pt"})
    save_file({"c": torch.zeros(3)}, source / "2.safetensors", {"odd": "metadata"})
    (source / "more" / "notes.txt").write_text("kept")
    copy_with_replacements(source, target, {"a": torch.full((3,), 7.0)})
    assert load_file(target / "1.safetensors")["a"].tolist() == [7, 7, 7]
    assert load_file(target / "1.safetensors")["b"].tolist() == [1, 1]
    assert (target / "2.safetensors").read_bytes() == (source / "2.safetensors").read_bytes()
    assert (target / "more" / "notes.txt").read_text() == "kept"
    with pytest.raises(lrquant.LrquantError, match="has no d"):
        copy_with_replacements(source, tmp_path, {"d": torch.zeros(1)})
