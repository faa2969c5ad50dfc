"""llama.cpp loads what is exported and computes what transformers computes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import lrquant
from lrquant.calibration.text import evaluation_ids
from lrquant.export.gguf.tokenizer import SPLITS
from lrquant.export.registry import export
from lrquant.zoo import zoo_model_path
from tests.llama_cpp import LlamaCpp
from tests.tiny import write_tiny

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

TEXT = "The quick brown fox jumps over 12345 lazy dogs; it's 3.5 o'clock.\n\n def f(x):\n    return x + 1"
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16,
    "short_factor": [1.0 + 0.01 * i for i in range(8)], "long_factor": [1.5 + 0.1 * i for i in range(8)],
}  # fmt: skip
_GEMMA = {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "biases, an odd vocabulary": ("llama", {"attention_bias": True, "mlp_bias": True, "vocab_size": 4099}),
    "heads of their own size": ("llama", {"head_dim": 32, "tie_word_embeddings": False}),
    "Llama 3's frequencies": ("llama", {"rope_parameters": _LLAMA3}),
    "mistral": ("mistral", {"sliding_window": 64}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", _GEMMA | {"num_hidden_layers": 6}),
    "fused tensors, part of the channels turned": ("phi3", {"rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "frequencies for long texts": ("phi3", {"rope_parameters": _LONG, "original_max_position_embeddings": 16}),
}  # fmt: skip


@pytest.mark.parametrize("case", FAMILIES)
def test_a_family_computes_the_same(case: str, tmp_path: Path) -> None:
    kind, changes = FAMILIES[case]
    folder = write_tiny(tmp_path / "m", kind, **changes)
    export(folder, tmp_path / "m.gguf", dtype="f32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXT).input_ids
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    runtime = LlamaCpp(tmp_path / "m.gguf", context=64)
    assert runtime.tokens(TEXT) == tokens
    for count in (1, 2, 20, len(tokens)) if "long" not in case else (len(tokens),):
        found = runtime.log_probabilities(tokens[:count], expected.shape[1])
        assert len(found) == expected.shape[1]
        # Keys and values are float16 in llama.cpp, and Gemma 2's attention is not fused.
        assert max(abs(found[i] - float(expected[count - 1, i])) for i in found) < 0.01


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled Llama in symmetric four bits, groups of 32."""
    folder = tmp_path_factory.mktemp("zoo") / "w4"
    recipe = lrquant.Recipe.preset(
        "rtn", calibration="zoo:pydoc", nsamples=2, seqlen=32, wbits=4, abits=16, group_size=32, symmetric=True
    )
    lrquant.quantize("zoo:llama", recipe, save_dir=folder)
    return folder


def test_the_perplexity_of_the_bundled_model_is_the_same(zoo: Path, tmp_path: Path) -> None:
    export(zoo, tmp_path / "zoo.gguf")
    model, tokenizer = lrquant.load(str(zoo)), AutoTokenizer.from_pretrained(zoo)
    tokens = evaluation_ids(tokenizer, "zoo:pydoc")[:160]
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:])
    runtime, row = LlamaCpp(tmp_path / "zoo.gguf", context=256), tokens.tolist()
    losses = [-runtime.log_probabilities(row[:count], 4096)[row[count]] for count in range(1, len(row))]
    found = math.exp(sum(losses) / len(losses))
    # llama.cpp rounds activations to 8 bits in blocks of 32.
    assert found == pytest.approx(math.exp(float(expected)), rel=0.005)


def test_greedy_text_is_the_same_in_float16(tmp_path: Path) -> None:
    export(zoo_model_path("llama"), tmp_path / "zoo.gguf", dtype="f16")
    model, tokenizer = lrquant.load("zoo:llama"), AutoTokenizer.from_pretrained(zoo_model_path("llama"))
    prompt = tokenizer("Return the number of", return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt.input_ids.shape[1] :].tolist()
    runtime = LlamaCpp(tmp_path / "zoo.gguf", context=64)
    assert runtime.greedy(prompt.input_ids[0].tolist(), 16) == expected


def trained(pieces: bool, split: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """A tokenizer of 600 tokens over bytes, or over characters with bytes as a fallback."""
    texts = [TEXT, "naïve café — Größe, 東京 2024; I'm WE'RE fooBarBaz HTTPServer\r\n\t x  y   z", *(TEXT.split() * 3)]
    special = ["<unk>", "<s>", "</s>", "<|end|>"]
    if not pieces:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = split
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(
            texts, trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
        )
        return tokenizer
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special += [f"<0x{byte:02X}>" for byte in range(256)]
    ascii_only = [text.encode("ascii", "ignore").decode() for text in texts]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, max_token_length=12)
    tokenizer.train_from_iterator(ascii_only, trainer)
    state = tokenizer.to_str().replace('"special":true', '"special":true')
    tokenizer = Tokenizer.from_str(state)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


SPLIT_CASES = {name: (steps, whole) for (steps, whole), name in SPLITS.items()} | {"pieces": ((), False)}


@pytest.mark.parametrize("name", SPLIT_CASES)
def test_llama_cpp_tokenizes_alike(name: str, tmp_path: Path) -> None:
    from tokenizers import Regex

    steps, whole = SPLIT_CASES[name]
    made: list[pre_tokenizers.PreTokenizer] = []
    for step in steps:
        if step == "byte level":
            made.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
        elif step == r"\p{N}":
            made.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            made += [pre_tokenizers.Split(Regex(step), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    tokenizer = trained(name == "pieces", pre_tokenizers.Sequence(made))
    if whole:
        tokenizer = Tokenizer.from_str(tokenizer.to_str().replace('"ignore_merges":false', '"ignore_merges":true'))
    folder = write_tiny(tmp_path / "m", vocab_size=768)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    export(folder, tmp_path / "m.gguf")
    loaded = AutoTokenizer.from_pretrained(folder)
    runtime = LlamaCpp(tmp_path / "m.gguf", context=64)
    for text in (
        TEXT,
        "I'm  here, WE'RE 12 345 6789 fooBarBaz HTTPServer\r\n\t x\n\n\n y  ",
        "naïve café 東京 ½ <|end|> ok",
    ):
        assert runtime.tokens(text) == loaded(text).input_ids, text
