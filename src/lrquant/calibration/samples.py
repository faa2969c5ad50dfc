"""Calibration samples for any model: windows of text, pictures, or pictures with text."""

from collections.abc import Callable
from typing import Any

from lrquant.calibration.dialogues import ZOO_QUESTIONS, dialogue_samples, is_dialogues
from lrquant.calibration.images import ZOO_PICTURES, image_samples
from lrquant.calibration.text import HUB_TEXTS, calibration_samples
from lrquant.errors import UsageError
from lrquant.loading.auto_class import Modality
from lrquant.recipe import Recipe


def samples_of(
    modality: Modality, processor: Any, recipe: Recipe, window: Callable[[int | None], int]
) -> tuple[list[dict[str, Any]], Recipe]:
    """(keyword arguments of one call per sample, the recipe with what was decided on the way).

    `window(seqlen)` gives the tokens of a text sample. A multimodal model may be calibrated on text alone.

    Raises:
        UsageError: the recipe's source does not fit the model, or is too small.
    """
    source, count, seed = recipe.calibration, recipe.nsamples, recipe.seed
    if modality == "image":
        if source in HUB_TEXTS:
            raise UsageError(
                f"{source} is text: a vision model is calibrated on a folder of pictures or {ZOO_PICTURES}"
            )
        return image_samples(processor, source, count, seed), recipe
    if modality == "image+text":
        if is_dialogues(source):
            return dialogue_samples(processor, source, count, seed), recipe
        if source == ZOO_PICTURES:
            raise UsageError(f"{source} has pictures without text: this model takes both, as {ZOO_QUESTIONS} has them")
        if "vision" in (recipe.towers or ()):
            raise UsageError(f"{source} is text: a vision tower is calibrated on {ZOO_QUESTIONS} or a .jsonl file")
        processor = processor.tokenizer
    recipe = recipe.changed(seqlen=window(recipe.seqlen))
    assert recipe.seqlen is not None
    rows = calibration_samples(processor, source, count, recipe.seqlen, seed)
    return [{"input_ids": row, "use_cache": False} for row in rows], recipe
