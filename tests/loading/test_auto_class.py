"""The class in a configuration's `architectures` is the class that is built, and what cannot be is refused at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

import lrquant
from lrquant.errors import UsageError
from lrquant.loading.auto_class import auto_model, fills_in_masks, modality_of
from lrquant.zoo import zoo_model_path

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("llama", "LlamaForCausalLM"),
        ("llama", "LlamaForSequenceClassification"),
        ("llama", "LlamaForTokenClassification"),
        ("llama", "LlamaModel"),
        ("bert", "BertForMaskedLM"),
        ("bert", "BertForSequenceClassification"),
        ("bert", "BertModel"),
        ("roberta", "RobertaForQuestionAnswering"),
        ("xlm-roberta", "XLMRobertaForMaskedLM"),
    ],
)
def test_the_class_that_the_configuration_names_is_built(model_type: str, architecture: str) -> None:
    config = AutoConfig.for_model(model_type, **SMALL, architectures=[architecture])
    assert type(auto_model(config).from_config(config)).__name__ == architecture


def test_a_class_under_an_older_name_is_built_by_what_it_is_for() -> None:
    config = AutoConfig.for_model("llama", **SMALL, architectures=["LLaMAForCausalLM"])
    assert auto_model(config) is transformers.AutoModelForCausalLM


def test_what_cannot_be_quantized_is_refused_by_its_configuration() -> None:
    with pytest.raises(UsageError, match="'t5' is not supported"):
        auto_model(AutoConfig.for_model("t5"))
    config = AutoConfig.for_model("bert", architectures=["BertForPreTraining"])
    with pytest.raises(UsageError, match="BertForPreTraining is not supported"):
        auto_model(config)


def test_encoders_are_fed_sentences_and_decoders_text() -> None:
    def built(model_type: str, architecture: str) -> Any:
        config = AutoConfig.for_model(model_type, **SMALL, architectures=[architecture])
        return auto_model(config).from_config(config)

    assert modality_of(built("bert", "BertModel")) == "sentences"
    assert modality_of(built("llama", "LlamaForSequenceClassification")) == "text"
    assert fills_in_masks(built("bert", "BertForMaskedLM"))
    assert not fills_in_masks(built("bert", "BertForSequenceClassification"))


def test_a_classifier_keeps_its_head(tmp_path: Path) -> None:
    """Plain transformers and lrquant load the same answers, and the scores are near the original's."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(zoo_model_path("llama"))
    config = AutoConfig.for_model("llama", **SMALL | {"vocab_size": len(tokenizer)}, num_labels=3)
    model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = lrquant.Recipe.preset("rtn", wbits=8, abits=16, calibration="zoo:pydoc", nsamples=2, seqlen=32)
    lrquant.quantize(str(tmp_path / "model"), recipe, save_dir=tmp_path / "quantized")
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    original, plain = (load(tmp_path / name, dtype=torch.float32).eval() for name in ("model", "quantized"))
    ours = lrquant.load(str(tmp_path / "quantized"))
    ids = torch.randint(1, 64, (1, 16))
    with torch.no_grad():
        expected, found, same = (each(input_ids=ids).logits for each in (original, plain, ours))
    assert torch.equal(plain.score.weight, original.score.weight)
    assert torch.equal(found, same)
    assert (found - expected).norm() < 0.05 * expected.norm()  # eight bits: a percent or so
