"""The verbs for models that see: `evaluate_images` and `evaluate_answers`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lrquant.calibration.dialogues import dialogues
from lrquant.calibration.images import pictures
from lrquant.errors import UsageError
from lrquant.evaluation import AnswerQuality, ImageAccuracy, answer_quality, image_accuracy
from lrquant.loading.auto_class import Modality, modality_of
from lrquant.loading.checkpoint import load
from lrquant.loading.pretrained import compute_dtype, load_processor, pick_device

PICTURES = 1000  # that are looked at unless a limit is given


def evaluate_images(
    model_or_path: Any, sources: Sequence[str], limit: int | None = None, processor: Any = None, **how: Any
) -> dict[str, ImageAccuracy]:
    """Top-1 and top-5 accuracy of an image classifier on each of `sources`: a folder with a subfolder per class,
    a data set on the hub, or `zoo:shapes`; up to `limit` pictures of each (1000).

    `how`: `device` and `dtype` ("auto"), `trust_remote_code` (False), `told(samples just done, of how many)`.
    """
    chosen = partial(pictures, train=False, limit=limit or PICTURES)
    return _measured(image_accuracy, sources, chosen, "image", model_or_path, processor, **how)


def evaluate_answers(
    model_or_path: Any, sources: Sequence[str], limit: int | None = None, processor: Any = None, **how: Any
) -> dict[str, AnswerQuality]:
    """Exact match and answer perplexity of a multimodal model on each of `sources`: `zoo:shapes-vqa`, or a .jsonl
    file of questions with answers; up to `limit` questions of each (all of a file). `how` as in `evaluate_images`.
    """
    chosen = partial(dialogues, train=False, limit=limit)
    return _measured(answer_quality, sources, chosen, "image+text", model_or_path, processor, **how)


def _measured(
    quality: Any,  # (model, processor, samples) → result
    sources: Sequence[str],
    chosen: Callable[[str], Any],  # the samples of a source
    wanted: Modality,
    model_or_path: Any,
    processor: Any,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """`quality` on the samples of each source, the model checked to take them and put back where it was."""
    on = pick_device(device)
    if not isinstance(model_or_path, str):
        model = model_or_path
    else:
        model = load(model_or_path, compute_dtype(dtype, on), trust_remote_code)
    found = modality_of(model)
    if found != wanted:
        raise UsageError(f"this model takes {found}, not {wanted}")
    if processor is None and not isinstance(model_or_path, str):
        raise UsageError("a model in memory needs its processor to be shown pictures")
    processor = processor or load_processor(model_or_path, wanted, trust_remote_code)
    home = next(model.parameters()).device
    model.to(on)
    try:
        return {source: quality(model, processor, chosen(source), told=told) for source in sources}
    finally:
        model.to(home)
