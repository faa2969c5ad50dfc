"""Models that are read block by block: the same bytes as from memory, and memory that does not grow with the model."""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import lrquant
from lrquant import Recipe
from lrquant.export import shards
from lrquant.loading.offload import open_offloaded
from lrquant.reconstruction.block_forward import BlockForward
from lrquant.reconstruction.callbacks import Callback
from tests.resume.test_resume import IDS, contents
from tests.tiny import SETTINGS, write_tiny

SPECIAL: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 16},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gpt_neox": {"tie_word_embeddings": False},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 128, "tie_word_embeddings": False},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 128},
}


def recipe(**changes: Any) -> Recipe:
    return Recipe.preset(**{"method": "lrquant", "wbits": 4, "abits": 8, **SETTINGS, **changes})


@pytest.mark.parametrize("model_type", SPECIAL)
def test_a_streamed_model_gives_the_same_bytes(model_type: str, tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path / "tiny", model_type, **SPECIAL[model_type])
    assert open_offloaded(str(tiny), torch.float32, None, False) is not None
    for name, keep in (("streamed", False), ("whole", True)):
        lrquant.quantize(str(tiny), recipe(), calibration=IDS, save_dir=tmp_path / name, keep_model=keep)
    assert contents(tmp_path / "streamed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("activations", ["device", "host", "disk"])
def test_activations_anywhere_give_the_same_bytes(activations: Any, tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path / "tiny")
    settings = {"method": "lrquant+", "dtype": "bfloat16"}
    for name, where in (("here", "host"), ("there", activations)):
        lrquant.quantize(str(tiny), recipe(**settings), calibration=IDS, save_dir=tmp_path / name, activations=where)
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


def test_one_block_at_a_time_has_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a block runs, all others are on the meta device; so is the head, always."""
    tiny = write_tiny(tmp_path / "tiny", num_hidden_layers=4, tie_word_embeddings=False)
    opened: list[Any] = []
    most: list[int] = []

    def watched(*arguments: Any) -> Any:
        opened.append(open_offloaded(*arguments))
        return opened[-1]

    real = BlockForward._call

    def call(self: BlockForward, *arguments: Any) -> Any:
        layers = opened[0][0].model.layers
        most.append(sum(not next(layer.parameters()).is_meta for layer in layers))
        assert opened[0][0].lm_head.weight.is_meta
        return real(self, *arguments)

    monkeypatch.setattr("lrquant.loading.original.open_offloaded", watched)
    monkeypatch.setattr(BlockForward, "_call", call)
    lrquant.quantize(str(tiny), recipe(), calibration=IDS, save_dir=tmp_path / "out")
    assert set(most) == {1}


def held_after_each_block(tiny: Path, changes: dict[str, Any], out: Path) -> list[int]:
    """What this process holds after every block, in bytes."""
    torch.set_num_threads(1)
    held: list[int] = []

    class Looks(Callback):
        def block_done(self, record: Any) -> None:
            held.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    settings = recipe(kernels="eager", **changes)
    lrquant.quantize(str(tiny), settings, calibration=IDS, save_dir=out, callback=Looks())
    return held


@pytest.mark.skipif(sys.platform != "linux", reason="memory is asked of /proc")
@pytest.mark.parametrize("changes", [{}, {"rounding": "learned"}], ids=["nearest", "learned"])
def test_memory_does_not_grow_with_the_number_of_blocks(changes: dict[str, Any], tmp_path: Path) -> None:
    """Eight blocks of 6 MB in float32 add less than one does; in a new process, whose heap is its own."""
    size = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12}
    tiny = write_tiny(tmp_path / "tiny", **size)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        held = process.submit(held_after_each_block, tiny, changes, tmp_path / "out").result()
    assert len(held) == 12
    assert held[-1] - held[3] < 6e6, [held[n] - held[3] for n in range(12)]


def test_large_results_are_written_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = write_tiny(tmp_path / "tiny", num_hidden_layers=4, tie_word_embeddings=False)
    lrquant.quantize(str(tiny), recipe(), calibration=IDS, save_dir=tmp_path / "one")
    monkeypatch.setattr(shards, "MOST_BYTES", 50_000)
    lrquant.quantize(str(tiny), recipe(), calibration=IDS, save_dir=tmp_path / "many")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) >= 4
    ids = {"input_ids": torch.arange(40)[None]}
    with torch.no_grad():
        one, many = (lrquant.load(str(tmp_path / name))(**ids).logits for name in ("one", "many"))
    assert torch.equal(one, many)


def test_a_model_of_several_stages_is_loaded_whole(tmp_path: Path) -> None:
    from tests.vision_models import build

    build("swin", torch.float32).save_pretrained(tmp_path / "swin")
    assert open_offloaded(str(tmp_path / "swin"), torch.float32, None, False) is None


def test_a_quantized_model_in_memory_is_the_saved_one(tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path / "tiny")
    quantized = lrquant.quantize(str(tiny), recipe(), calibration=IDS, save_dir=tmp_path / "out", callback=Callback())
    kept = lrquant.quantize(str(tiny), recipe(), calibration=IDS)
    ids = {"input_ids": torch.arange(40)[None]}
    with torch.no_grad():
        assert torch.equal(quantized.model(**ids).logits, kept.model(**ids).logits)
