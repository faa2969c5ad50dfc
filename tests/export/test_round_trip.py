"""What is written is what was computed: from disk, with and without lrquant, to the last bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lrquant
from lrquant import Recipe
from lrquant.evaluation import perplexity
from lrquant.export import shards
from tests.tiny import SETTINGS, write_tiny

IDS = torch.arange(5, 69)[None]

FORMATS = {
    "W4A4": {"wbits": 4, "abits": 4},
    "W4A4 g32": {"wbits": 4, "abits": 4, "group_size": 32},
    "W4A8 symmetric": {"wbits": 4, "abits": 8, "symmetric": True},
    "W6A6": {"wbits": 6, "abits": 6},
    "W8A8": {"wbits": 8, "abits": 8},
    "W4A16": {"wbits": 4, "abits": 16},
    "W4A16 g64 symmetric": {"wbits": 4, "abits": 16, "group_size": 64, "symmetric": True},
    "W3A16": {"wbits": 3, "abits": 16},
    "W2A16 g64": {"wbits": 2, "abits": 16, "group_size": 64},
    "W5A16": {"wbits": 5, "abits": 16},
    "W16A4": {"wbits": 16, "abits": 4},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_checkpoint_computes_what_the_model_in_memory_does(
    name: str, dtype: str, tiny: Path, tmp_path: Path
) -> None:
    """Same integers, same scales, same operations in the same precision: logits are equal bit for bit."""
    recipe = Recipe.preset("lrquant", **FORMATS[name], **SETTINGS, dtype=dtype, quantize_attention=False)
    quantized = lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "out", keep_model=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    assert torch.equal(logits(plain), logits(quantized.model))
    full = AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype)
    assert not torch.equal(logits(full), logits(plain))


def test_attention_inputs_are_quantized_by_load_and_only_there(tiny: Path, tmp_path: Path) -> None:
    recipe = Recipe.preset("lrquant", wbits=4, abits=4, **SETTINGS)
    quantized = lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "out", keep_model=True)
    assert torch.equal(logits(lrquant.load(str(tmp_path / "out"))), logits(quantized.model))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    assert not torch.equal(logits(plain), logits(quantized.model))
    assert any("queries, keys and values" in note for note in quantized.notes)


def test_it_loads_and_generates_where_lrquant_is_not_installed(tiny: Path, tmp_path: Path) -> None:
    recipe = Recipe.preset("lrquant", wbits=4, abits=4, **SETTINGS)
    lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "out", keep_model=True)
    program = f"""
import sys
sys.modules["lrquant"] = None  # any import of it fails
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "out")!r})
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r})
inputs = tokenizer("The import statement", return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
print(ids.shape[1] - inputs["input_ids"].shape[1])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "4", done.stderr


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_a_flat_input_is_quantized_per_token_on_disk_too(model_type: str, tmp_path: Path) -> None:
    """OPT's MLP sees (tokens, hidden), which compressed-tensors would take for one range over all tokens."""
    tiny = write_tiny(tmp_path / "tiny", model_type, **({"ffn_dim": 128, "word_embed_proj_dim": 64}))
    recipe = Recipe.preset("lrquant", wbits=4, abits=4, **SETTINGS, quantize_attention=False)
    quantized = lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "out", keep_model=True)
    flat = {f"model.decoder.layers.{block}.{linear}" for block in (0, 1) for linear in ("fc1", "fc2")}
    assert quantized.result.flat_inputs == (flat if model_type == "opt" else set())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    assert torch.equal(logits(plain), logits(quantized.model))


def test_packed_weights_take_their_bits(tiny: Path, tmp_path: Path) -> None:
    for bits, expected in ((4, 4.0), (3, 3.0), (2, 2.0)):
        recipe = Recipe.preset("rtn", wbits=bits, abits=16, **SETTINGS)
        quantized = lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / str(bits), keep_model=True)
        tensors = load_file(tmp_path / str(bits) / "model.safetensors")
        packed = sum(tensor.nbytes for name, tensor in tensors.items() if name.endswith("weight_packed"))
        weights = sum(
            module.weight.numel()
            for block in quantized.model.model.layers
            for module in block.modules()
            if isinstance(module, torch.nn.Linear)
        )
        assert packed * 8 / weights == expected
        on_disk = sum(tensor.nbytes for tensor in tensors.values())
        assert quantized.sizes.checkpoint_bytes == on_disk
        # One bf16 scale and one zero point of `bits` bits per row; rows are 64 to 128 weights here.
        assert expected < quantized.sizes.bits_per_weight < expected + (16 + bits) / 64


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tiny: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        recipe = Recipe.preset("lrquant", wbits=4, abits=4, **SETTINGS, seed=seed)
        lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / name)
    one, two, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "other"))
    assert one == two
    assert one != other


def test_a_recipe_beside_the_checkpoint_makes_it_again(tiny: Path, tmp_path: Path) -> None:
    lrquant.quantize(str(tiny), Recipe.preset("omniquant", wbits=3, abits=8, **SETTINGS), save_dir=tmp_path / "one")
    again = Recipe.from_yaml(tmp_path / "one" / "recipe.yaml")
    lrquant.quantize(str(tiny), again, save_dir=tmp_path / "two")
    for name in ("model.safetensors", "recipe.yaml", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_large_checkpoints_are_split_and_load(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MOST_BYTES", 20_000)
    recipe = Recipe.preset("rtn", wbits=4, abits=16, **SETTINGS)
    quantized = lrquant.quantize(str(tiny), recipe, save_dir=tmp_path / "out", keep_model=True)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    assert torch.equal(logits(lrquant.load(str(tmp_path / "out"))), logits(quantized.model))


def test_what_lies_beside_the_weights(tiny: Path, tmp_path: Path) -> None:
    lrquant.quantize(
        str(tiny), Recipe.preset("lrquant", wbits=4, abits=4, **SETTINGS), save_dir=tmp_path / "out", keep_model=True
    )
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "recipe.yaml", "README.md"} <= files
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("class").input_ids
    card = (tmp_path / "out" / "README.md").read_text()
    assert "quantization: W4A4" in card
    assert "base_model" not in card  # a local folder; the hub would refuse it
    scheme = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"][
        "group_0"
    ]
    assert (scheme["weights"]["num_bits"], scheme["input_activations"]["num_bits"]) == (4, 4)


class TestShiftOnRmsNorm:
    """The biases that RMSNorm models lack make a checkpoint of lrquant's own kind."""

    @pytest.fixture(scope="class")
    def saved(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
        folder = tmp_path_factory.mktemp("shift")
        tiny = write_tiny(folder / "tiny")
        recipe = Recipe.preset("lrquant", wbits=4, abits=4, **SETTINGS, shift="on", let_lr=0.05)
        quantized = lrquant.quantize(str(tiny), recipe, save_dir=folder / "out", keep_model=True)
        biases = [name for name in load_file(folder / "out" / "model.safetensors") if name.endswith(".bias")]
        assert any("input_layernorm" in name for name in biases)
        return folder / "out", logits(quantized.model)

    def test_load_gives_the_model_in_memory(self, saved: tuple[Path, torch.Tensor]) -> None:
        assert torch.equal(logits(lrquant.load(str(saved[0]))), saved[1])

    @pytest.mark.parametrize("imports", ["import lrquant\nimport transformers", "import transformers\nimport lrquant"])
    def test_transformers_reads_it_once_lrquant_is_imported(
        self, imports: str, saved: tuple[Path, torch.Tensor]
    ) -> None:
        program = f"""{imports}
model = transformers.AutoModelForCausalLM.from_pretrained({str(saved[0])!r}, dtype="float32")
print(type(model).__name__, float(model.model.layers[0].input_layernorm.bias.abs().sum()) > 0)
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == "LlamaForCausalLM True", done.stderr

    def test_plain_transformers_refuses_it(self, saved: tuple[Path, torch.Tensor]) -> None:
        program = f"""
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({str(saved[0])!r})
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        assert done.returncode != 0
        assert "model type `lrquant`" in done.stderr


def test_a_checkpoint_that_was_evaluated_can_be_trained(tiny: Path, tmp_path: Path) -> None:
    """compressed-tensors caches what a format's integers are: nothing else here has inputs of seven bits."""
    lrquant.quantize(str(tiny), Recipe.preset("rtn", wbits=16, abits=7), [IDS], save_dir=tmp_path / "out")
    loaded = lrquant.load(str(tmp_path / "out"))
    assert perplexity(loaded, torch.arange(5, 37), 32).windows == 1
    answer = loaded(inputs_embeds=torch.randn(1, 8, loaded.config.hidden_size, requires_grad=True)).logits
    assert answer.requires_grad
    answer.sum().backward()
