"""What a model takes in (text, images, or both), and the Auto classes of transformers that go with it."""

from typing import Any, Literal

Modality = Literal["text", "image", "image+text"]


def auto_model(config: Any) -> Any:
    """The Auto class whose models the checkpoint of `config` holds: with a head, or a tower alone.

    The configuration's `architectures` decide; without them, the richest class that knows the model's type.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    known: dict[str, Any] = {
        "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForImageClassification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    }
    architecture = next(iter(getattr(config, "architectures", None) or ()), None)
    for auto, names in known.items():
        classes = names.get(config.model_type, ())
        if architecture in ((classes,) if isinstance(classes, str) else classes):
            return getattr(transformers, auto)
    if architecture is None:
        for auto, names in known.items():
            if config.model_type in names:
                return getattr(transformers, auto)
    return transformers.AutoModelForCausalLM


def modality_of(model: Any) -> Modality:
    """What `model` is fed: decided by its class, so that a model in memory answers as one from disk does."""
    from lrquant.architectures import family_of

    towers = family_of(model).towers
    if "vision" not in towers:
        return "text"
    return "image+text" if "language" in towers else "image"
