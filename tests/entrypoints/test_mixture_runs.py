"""The whole of lrquant-max on small mixtures of experts, and what may come after it."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import lrquant
from lrquant import Recipe
from lrquant.errors import Interrupted
from lrquant.loading.offload import open_offloaded
from lrquant.runtime.distributed import ALONE, Ranks
from tests import mixtures
from tests.cli.run import lrquant as lrquant_here
from tests.resume.test_resume import Stops, contents
from tests.runtime.test_distributed import on_ranks
from tests.tiny import write_tiny

IDS = [torch.arange(first, first + 32)[None] for first in range(100, 900, 100)]
FEW_STEPS = {"wbits": 3, "abits": 8, "group_size": 32, "epochs": 1, "batch_size": 4}
MOST = Recipe.preset("lrquant-max", **FEW_STEPS, tuning_epochs=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixtures")


def tiny(folder: Path, name: str) -> Path:
    kind, changes = mixtures.MIXTURES[name]
    return write_tiny(folder / name, kind, **changes | {"tie_word_embeddings": False})


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=torch.arange(5, 45)[None], use_cache=False).logits


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_the_whole_of_lrquant_max(name: str, folder: Path) -> None:
    """With its streams in memory, on disk, and after an interruption: the same bytes."""
    model = tiny(folder, name)
    run = functools.partial(lrquant.quantize, str(model), MOST, IDS)
    kept = run(save_dir=folder / f"{name}-max", keep_model=True)
    assert all(record.final_loss < record.initial_loss for record in kept.records)
    assert kept.result.tuning is not None
    assert kept.result.tuning.final_loss <= kept.result.tuning.initial_loss
    learned = kept.result.learned[1]
    for part in ("clip_low", "rotation"):  # offsets are not kept once they are integers
        assert sum(each.endswith(f"_proj.{part}") and ".experts." in each for each in learned) == 4 * 3
    assert sum(each.endswith("up->down.scale") and ".experts." in each for each in learned) == 4 * (name != "gpt_oss")
    assert "post_attention_layernorm->linears.scale" in learned
    expected = contents(folder / f"{name}-max")
    run(save_dir=folder / f"{name}-disk", activations="disk")
    assert contents(folder / f"{name}-disk") == expected
    with pytest.raises(Interrupted):
        run(save_dir=folder / f"{name}-resumed", callback=Stops(1))
    run(save_dir=folder / f"{name}-resumed")
    assert contents(folder / f"{name}-resumed") == expected
    loaded = lrquant.load(str(folder / f"{name}-max"))
    if name == "gpt_oss":  # its rows are interleaved in memory, and so added up in another order
        assert torch.allclose(logits(loaded), logits(kept.model), atol=1e-5)
    else:
        assert torch.equal(logits(loaded), logits(kept.model))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
def test_experts_are_read_from_disk_with_their_block(name: str, folder: Path) -> None:
    """One tensor an expert, fused and transposed, fused in all tokens' order: the same bytes as from memory."""
    model = tiny(folder, name)
    assert open_offloaded(str(model), torch.float32, None, False) is not None
    recipe = Recipe.preset("lrquant-max", **FEW_STEPS)
    for out, keep_model in (("streamed", False), ("whole", True)):
        lrquant.quantize(str(model), recipe, IDS, save_dir=folder / f"{name}-{out}", keep_model=keep_model)
    assert contents(folder / f"{name}-streamed") == contents(folder / f"{name}-whole")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mixtral", {"rounding": "gptq", **FEW_STEPS}),
        ("mixtral", {"format": "nvfp4", "rounding": "learned"}),
        ("deepseek_v3", {"format": "nvfp4", "rounding": "gptq"}),
        ("qwen3_moe", {"method": "smoothquant", "wbits": 8, "abits": 8}),
        ("llama4", {"wbits": 4, "abits": 8}),
    ],
)
def test_ways_of_rounding_and_formats_of_experts(name: str, changes: dict[str, Any], folder: Path) -> None:
    """What is kept is what is loaded, and the router is stored as the smoothed experts want it."""
    model, out = tiny(folder, name), folder / "-".join([name, *map(str, changes.values())])
    recipe = Recipe.preset(**{"epochs": 1, "batch_size": 4, **changes})
    quantized = lrquant.quantize(str(model), recipe, IDS, save_dir=out, keep_model=True)
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded, kept, full = lrquant.load(str(out)), logits(quantized.model), logits(original)
    assert torch.allclose(logits(loaded), kept, atol=1e-5)
    assert 0 < float((kept - full).norm() / full.norm()) < 0.6
    assert all(record.final_loss <= record.initial_loss for record in quantized.records)
    before, after = dict(original.named_parameters()), dict(loaded.named_parameters())
    routers = [key for key, value in after.items() if key in before and value.shape == (4, 64)]
    assert routers
    assert not any(torch.equal(after[key], before[key]) for key in routers)


def test_adaptation_to_another_text(folder: Path) -> None:
    model = tiny(folder, "qwen3_moe")
    lrquant.quantize(str(model), Recipe.preset("lrquant", **FEW_STEPS), IDS, save_dir=folder / "plain")
    others = [ids + 1000 for ids in IDS]
    lrquant.adapt(folder / "plain", model, others, save_dir=folder / "adapted", blocks="all")
    full = logits(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    adapted = logits(lrquant.load(str(folder / "adapted")))
    assert not torch.equal(adapted, logits(lrquant.load(str(folder / "plain"))))
    assert float((adapted - full).norm() / full.norm()) < 0.6


def test_a_dry_run_says_what_of_a_mixture_is_quantized(folder: Path) -> None:
    model = tiny(folder, "mixtral")
    options = ["--method", "lrquant-max", "--dry-run", "--json", str(folder / "plan.json"), "--seqlen", "32"]
    said = lrquant_here("quantize", str(model), *options, "--calibration", "zoo:pydoc", "--nsamples", "4")
    assert said.returncode == 0, said.stderr
    assert "router or gate" in said.stdout
    assert not list(folder.glob("mixtral-*W4A4*"))


def losses(ranks: Ranks, model: Path, folder: Path) -> Sequence[Any]:
    recipe = Recipe.preset("lrquant", **FEW_STEPS, let_lr=1e-4, lwc_lr=1e-4)
    quantized = lrquant.quantize(str(model), recipe, calibration=IDS, save_dir=folder / f"ranks{ranks.world}")
    return [[record.final_loss, record.expert_tokens] for record in quantized.records]


def test_two_ranks_do_what_one_does(folder: Path) -> None:
    model = tiny(folder, "mixtral")
    alone = losses(ALONE, model, folder)
    first, second = on_ranks(2, functools.partial(losses, model=model, folder=folder), folder)
    assert first == second
    for (loss, tokens), (expected, counts) in zip(first, alone, strict=True):
        assert loss == pytest.approx(expected, rel=1e-3)
        assert tokens == counts
