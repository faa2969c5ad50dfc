"""Encoders are calibrated and measured on text between the special tokens that their tokenizer sets."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedTokenizerFast

import lrquant
from lrquant.calibration.sentences import batches, room, sentence_samples, special_tokens
from lrquant.entrypoints.evaluate import evaluate, evaluate_embeddings
from lrquant.errors import UsageError
from lrquant.evaluation.embeddings import compare_embeddings
from lrquant.evaluation.masked import masked_perplexity

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [chr(code) for code in range(33, 127)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token a character, between [CLS] and [SEP]."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *LETTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=40,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with random weights, and its tokenizer."""
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert", vocab_size=len(SPECIAL) + len(LETTERS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=48,
    )  # fmt: skip
    model = AutoModelForMaskedLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            parameter.data.mul_(8)  # so that blocks do something next to the residual
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_samples_are_full_windows_between_special_tokens(tokenizer: Any) -> None:
    assert special_tokens(tokenizer) == ([2], [3])
    samples = sentence_samples(tokenizer, "zoo:pydoc", 3, seqlen=16, seed=0)
    for sample in samples:
        ids = sample["input_ids"][0]
        assert (len(ids), int(ids[0]), int(ids[-1])) == (16, 2, 3)
        assert not set(ids[1:-1].tolist()) & {0, 2, 3, 4}
        assert sample["attention_mask"].all()


def test_no_window_is_longer_than_the_tokenizer_says_the_model_takes(tokenizer: Any) -> None:
    assert room(tokenizer, 512) == 38
    with pytest.raises(UsageError, match="seqlen 2 is too short"):
        room(tokenizer, 2)


def test_batches_are_padded_and_masked(tokenizer: Any) -> None:
    (batch,) = batches(tokenizer, ["ab", "abcd"], batch=2, seqlen=512)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]


def test_masked_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary(tokenizer: Any, folder: Path) -> None:
    model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    for parameter in model.cls.parameters():
        parameter.data.zero_()
    measured = masked_perplexity(model, tokenizer, torch.randint(5, 90, (100,)), seqlen=22)
    assert measured.windows == 5
    assert measured.value == pytest.approx(len(SPECIAL) + len(LETTERS))


def test_neighbours_and_cosines_are_counted_by_hand() -> None:
    theirs = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), dim=-1)
    same = compare_embeddings(theirs, theirs)
    assert (same.cosine, same.neighbours, same.sentences) == (pytest.approx(1), 1.0, 3)
    ours = theirs.clone()
    ours[2] = -theirs[2]
    assert compare_embeddings(ours, theirs).least == pytest.approx(-1)


def test_an_encoder_is_quantized_saved_and_measured(folder: Path, tmp_path: Path) -> None:
    recipe = lrquant.Recipe.preset(
        "lrquant", wbits=8, abits=8, calibration="zoo:pydoc", nsamples=4, seqlen=32, epochs=1, batch_size=2
    )
    quantized = lrquant.quantize(str(folder), recipe, save_dir=tmp_path / "quantized")
    assert quantized.notes[0].endswith("verified: value->output, query*key.")
    plain = AutoModelForMaskedLM.from_pretrained(tmp_path / "quantized", dtype=torch.float32).eval()
    original = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(5, 90, (1, 20))
    with torch.no_grad():
        found, expected = plain(input_ids=ids).logits, original(input_ids=ids).logits
    assert (found - expected).norm() < 0.05 * expected.norm()
    measured = evaluate(str(tmp_path / "quantized"), ["zoo:pydoc"], 32, limit_windows=2)
    assert measured["zoo:pydoc"].windows == 2
    quality = evaluate_embeddings(str(tmp_path / "quantized"), str(folder), ["zoo:pydoc"], limit=12)["zoo:pydoc"]
    assert quality.sentences == 12
    assert 0.99 < quality.cosine < 1  # eight bits
