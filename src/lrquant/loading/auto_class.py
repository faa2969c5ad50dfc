"""What a model takes in, and the class of transformers that its checkpoint is loaded with."""

from typing import Any, Literal

from lrquant.errors import UsageError

# text: read from left to right. sentences: text between special tokens, read both ways (BERT and its kind).
Modality = Literal["text", "sentences", "image", "image+text"]

# Auto classes whose models can be quantized, and the end of transformers' name for their table of classes. The order is
# that in which a configuration that names no class is given one: the richest first.
_AUTO = {
    "AutoModelForImageTextToText": "FOR_IMAGE_TEXT_TO_TEXT",
    "AutoModelForCausalLM": "FOR_CAUSAL_LM",
    "AutoModelForMaskedLM": "FOR_MASKED_LM",
    "AutoModelForImageClassification": "FOR_IMAGE_CLASSIFICATION",
    "AutoModelForSequenceClassification": "FOR_SEQUENCE_CLASSIFICATION",
    "AutoModelForTokenClassification": "FOR_TOKEN_CLASSIFICATION",
    "AutoModelForQuestionAnswering": "FOR_QUESTION_ANSWERING",
    "AutoModelForMultipleChoice": "FOR_MULTIPLE_CHOICE",
    "AutoModelForNextSentencePrediction": "FOR_NEXT_SENTENCE_PREDICTION",
    "AutoModel": "",
}


def auto_model(config: Any) -> Any:
    """The Auto class that builds the class in the configuration's `architectures`: with its head, or without any.

    Without `architectures` it is the richest class that knows the model's type.

    Raises:
        UsageError: the model is an encoder with a decoder behind it, or its class is of no kind that is known here.
    """
    import transformers

    from lrquant.architectures.discovery import check_one_chain

    check_one_chain(config)
    architecture = next(iter(getattr(config, "architectures", None) or ()), None)
    if architecture is None:
        known = (auto for auto in _AUTO if _classes(auto, config.model_type))
        return getattr(transformers, next(known, "AutoModelForCausalLM"))
    for auto in _AUTO:
        if architecture in _classes(auto, config.model_type):
            return getattr(transformers, auto)
    _, head, task = architecture.rpartition("For")
    named = f"AutoModelFor{task}"  # code of the model's own, or a class under an older name
    if (head and named in _AUTO) or named in (getattr(config, "auto_map", None) or {}):
        return getattr(transformers, named)
    if hasattr(transformers, architecture):
        kinds = ", ".join(auto.removeprefix("AutoModel") for auto in _AUTO if auto != "AutoModel")
        raise UsageError(f"{architecture} is not supported: supported are models without a head, and those {kinds}")
    return transformers.AutoModel if not head else transformers.AutoModelForCausalLM


def _classes(auto: str, model_type: str) -> tuple[str, ...]:
    """Names of the classes that the Auto class `auto` has for models of this type."""
    from transformers.models.auto import modeling_auto

    table = "_".join(part for part in ("MODEL", _AUTO[auto], "MAPPING_NAMES") if part)
    classes = getattr(modeling_auto, table).get(model_type, ())
    return (classes,) if isinstance(classes, str) else tuple(classes)


def modality_of(model: Any) -> Modality:
    """What `model` is fed: decided by its class, so that a model in memory answers as one from disk does."""
    from lrquant.architectures import family_of

    towers = family_of(model).towers
    if "vision" in towers:
        return "image+text" if "language" in towers else "image"
    return "sentences" if reads_both_ways(model) else "text"


def reads_both_ways(model: Any) -> bool:
    """Whether `model` is an encoder of text: of a type that fills in masked tokens, and not built to go on writing."""
    model_type = model.config.model_type
    masked, causal = _classes("AutoModelForMaskedLM", model_type), _classes("AutoModelForCausalLM", model_type)
    return bool(masked) and type(model).__name__ not in causal and not getattr(model.config, "is_decoder", False)


def fills_in_masks(model: Any) -> bool:
    """Whether `model` has a head that predicts masked tokens."""
    return type(model).__name__ in _classes("AutoModelForMaskedLM", model.config.model_type)
