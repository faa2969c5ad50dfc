"""Calibration samples for any model: windows of text, images, or images with text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lrquant.calibration.dialogues import ZOO_QUESTIONS, dialogue_samples, is_dialogues
from lrquant.calibration.images import ZOO_PICTURES, image_samples
from lrquant.calibration.sentences import sentence_samples
from lrquant.calibration.text import HUB_TEXTS, calibration_samples
from lrquant.errors import UsageError
from lrquant.loading.auto_class import Modality
from lrquant.recipe import Recipe


def samples_of(
    modality: Modality, processor: Any, recipe: Recipe, *, window: Callable[[int | None], int]
) -> list[dict[str, Any]]:
    """The recipe's calibration samples, as keyword arguments of one call each.

    `window(seqlen)` returns the tokens per text sample. A multimodal model can be calibrated on text only.

    Raises:
        UsageError: the recipe's source does not fit the model, or is too small.
    """
    source, count, seed = recipe.calibration, recipe.nsamples, recipe.seed
    if modality == "image":
        if source in HUB_TEXTS:
            raise UsageError(f"{source} is text: a vision model needs a folder of images or {ZOO_PICTURES}")
        return image_samples(processor, source, count, seed)
    if modality == "sentences":
        return sentence_samples(processor, source, count, seqlen=window(recipe.seqlen), seed=seed)
    if modality == "image+text":
        if is_dialogues(source):
            return dialogue_samples(processor, source, count, seed)
        if source == ZOO_PICTURES:
            raise UsageError(f"{source} has images without text, but this model takes both; try {ZOO_QUESTIONS}")
        if "vision" in (recipe.towers or ()):
            raise UsageError(f"{source} is text: a vision tower needs {ZOO_QUESTIONS} or a .jsonl file")
        processor = getattr(processor, "tokenizer", processor)  # without an image processor it is the tokenizer
    return text_samples(calibration_samples(processor, source, count, window(recipe.seqlen), seed, bos=recipe.bos))


@dataclass(frozen=True)
class TokenIds:
    """Tokenized text: `rows` of token ids, (1, tokens) each, and its name in recipes."""

    rows: Sequence[Tensor]
    name: str = "token ids given in memory"


def text_samples(rows: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Samples of token ids, (1, tokens) each."""
    return [{"input_ids": row, "use_cache": False} for row in rows]
