"""A whole checkpoint as GGUF, read back by gguf's reader; and what is refused, with nothing left behind."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lrquant
from lrquant.errors import LrquantError, UsageError
from lrquant.export.registry import export
from lrquant.loading.stored_weights import StoredWeights
from tests.cli.run import lrquant as command
from tests.tiny import write_tiny

gguf = pytest.importorskip("gguf")


def quantized(model: Path, folder: Path, **settings: Any) -> Path:
    recipe = lrquant.Recipe.preset("rtn", calibration="zoo:pydoc", nsamples=2, seqlen=32, **settings)
    lrquant.quantize(str(model), recipe, save_dir=folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def four_bits(model: Path) -> Path:
    return quantized(model, model.parent / "w4", wbits=4, abits=16, group_size=32, symmetric=True)


def read(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor of a GGUF file, dequantized."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = values.reshape(tuple(reversed(tensor.shape.tolist())))
    return found


def rope_order(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Channel i of the first half of each head, then channel i of the second, by definition."""
    size = values.shape[0] // heads
    rows = [head * size + part * size // 2 + i for head in range(heads) for i in range(size // 2) for part in (0, 1)]
    return values[rows]


def test_every_weight_of_the_checkpoint_is_in_the_file(four_bits: Path, tmp_path: Path) -> None:
    written = export(four_bits, tmp_path / "out.gguf")
    assert written.facts["quantized weights"] == "equal, all of them"
    found, loaded = read(written.path), lrquant.load(str(four_bits)).state_dict()
    assert len(found) == 2 + 2 * 9
    for block in range(2):
        attention, mlp = f"model.layers.{block}.self_attn", f"model.layers.{block}.mlp"
        for theirs, ours, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
            expected = rope_order(loaded[f"{attention}.{ours}.weight"], heads)
            assert np.array_equal(found[f"blk.{block}.{theirs}.weight"], expected.numpy())
        for theirs, name in (("attn_v", f"{attention}.v_proj"), ("attn_output", f"{attention}.o_proj"),
                             ("ffn_down", f"{mlp}.down_proj"), ("ffn_up", f"{mlp}.up_proj")):  # fmt: skip
            assert np.array_equal(found[f"blk.{block}.{theirs}.weight"], loaded[f"{name}.weight"].numpy())
        norm = loaded[f"model.layers.{block}.input_layernorm.weight"]
        assert np.array_equal(found[f"blk.{block}.attn_norm.weight"], norm.numpy())
    assert np.allclose(found["token_embd.weight"], loaded["model.embed_tokens.weight"].numpy(), atol=1e-6)


def test_the_file_says_what_llama_cpp_must_know(four_bits: Path, tmp_path: Path) -> None:
    export(four_bits, tmp_path / "out.gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "out.gguf").fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q4_0,
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: fields[name] for name in expected} == expected
    assert len(fields["tokenizer.ggml.tokens"]) == 4096
    assert fields["tokenizer.ggml.token_type"][0] == gguf.TokenType.CONTROL


def test_norms_that_add_one_and_the_chat_template(tmp_path: Path) -> None:
    window = {"sliding_window": 16, "query_pre_attn_scalar": 16, "head_dim": 16}
    model = write_tiny(tmp_path / "gemma", "gemma2", **window)
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    export(model, tmp_path / "gemma.gguf", dtype="f32")
    norm = StoredWeights(model).tensor("model.layers.1.post_feedforward_layernorm.weight").float() + 1
    assert np.array_equal(read(tmp_path / "gemma.gguf")["blk.1.post_ffw_norm.weight"], norm.numpy())
    fields = gguf.GGUFReader(tmp_path / "gemma.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == "{{ messages[0].content }}"
    assert fields["gemma2.attention.sliding_window"].contents() == 16


@pytest.mark.parametrize("dtype", ["bf16", "q8_0"])
def test_what_is_not_quantized_becomes_what_was_asked_for(four_bits: Path, tmp_path: Path, dtype: str) -> None:
    export(four_bits, tmp_path / "out.gguf", dtype=dtype)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert types["token_embd.weight"] == dtype.upper()
    assert types["blk.0.attn_q.weight"] == "Q4_0"
    assert types["output_norm.weight"] == "F32"


def test_widths_that_no_block_divides_are_kept_whole(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "odd", intermediate_size=80)
    folder = quantized(model, tmp_path / "w4", wbits=4, abits=8, symmetric=True, quantize_attention=False)
    written = export(folder, tmp_path / "out.gguf")
    assert [note.split(":")[0] for note in written.notes] == [
        "The checkpoint's 8-bit activations are not part of a GGUF file",
        "2 weights are float32",
    ]
    loaded = lrquant.load(str(folder)).state_dict()
    assert np.array_equal(
        read(written.path)["blk.0.ffn_down.weight"], loaded["model.layers.0.mlp.down_proj.weight"].numpy()
    )


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "groups of 16": ({}, {"wbits": 4, "abits": 16, "group_size": 16, "symmetric": True}, "multiples of 32"),
    "eight bits with zero points": ({}, {"wbits": 8, "abits": 16}, "use --symmetric"),
    "four-bit floats": ({}, {"format": "nvfp4a16"}, "holds 4-bit floats, not integers"),
    "scales in float32": (
        {"dtype": torch.float32},
        {"wbits": 4, "abits": 16, "symmetric": True},
        "float32 precision, which do not fit llama.cpp's float16",
    ),
    "transforms at run time": ({}, {"wbits": 4, "abits": 4, "rotate": ("down",)}, "needs lrquant to run"),
    "a family without a row": (
        {"model_type": "olmo2"},
        {"wbits": 4, "abits": 16},
        "olmo2: GGUF export does not support it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_held_is_refused(case: str, tmp_path: Path) -> None:
    changes, settings, said = REFUSED[case]
    folder = quantized(write_tiny(tmp_path / "model", **changes), tmp_path / "w", **settings)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UsageError, match=said) as refused:
        export(folder, out / "model.gguf")
    assert "\n" not in str(refused.value)
    assert not list(out.iterdir())


def test_bad_targets_and_damaged_files(four_bits: Path, tmp_path: Path) -> None:
    (tmp_path / "there.gguf").write_text("")
    for target, said in (("there.gguf", "already exists"), ("nowhere/out.gguf", "does not exist")):
        with pytest.raises(UsageError, match=said):
            export(four_bits, tmp_path / target)
    with pytest.raises(UsageError, match="unknown exporter 'onnx': there are gguf"):
        export(four_bits, tmp_path / "out.gguf", to="onnx")
    with pytest.raises(UsageError, match="dtype int3: gguf has f16"):
        export(four_bits, tmp_path / "out.gguf", dtype="int3")
    with pytest.raises(UsageError, match="no such folder"):
        export(tmp_path / "missing", tmp_path / "out.gguf")
    damaged = tmp_path / "damaged"
    shutil.copytree(four_bits, damaged)
    file = damaged / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 255
    file.write_bytes(content)
    with pytest.raises(LrquantError, match="damaged"):
        export(damaged, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*out*"))


def test_the_command(four_bits: Path, tmp_path: Path) -> None:
    done = command("export", four_bits, tmp_path / "out.gguf", "--to", "gguf", "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    assert "equal, all of them" in done.stdout
    assert '"quantized weights"' in (tmp_path / "figures.json").read_text()
    again = command("export", four_bits, tmp_path / "out.gguf")
    assert again.returncode == 2
    assert "already exists" in again.stderr
