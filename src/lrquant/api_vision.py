"""The verbs for models that see: `evaluate_images` and `evaluate_answers`."""

from collections.abc import Callable, Sequence
from typing import Any

from lrquant.calibration.dialogues import dialogues
from lrquant.calibration.images import pictures
from lrquant.checkpoints import load
from lrquant.errors import UsageError
from lrquant.evaluation import AnswerQuality, ImageAccuracy, answer_quality, image_accuracy
from lrquant.modality import Modality, modality_of
from lrquant.models import compute_dtype, load_processor, pick_device

PICTURES = 1000  # that are looked at unless a limit is given


def evaluate_images(
    model_or_path: Any,
    sources: Sequence[str],
    limit: int | None = None,
    processor: Any = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, ImageAccuracy]:
    """Top-1 and top-5 accuracy of an image classifier on each of `sources`: a folder with a subfolder per class,
    a data set on the hub, or `zoo:shapes`; up to `limit` pictures of each (1000).
    """

    def measure(model: Any, source: str) -> ImageAccuracy:
        return image_accuracy(model, prepared, pictures(source, train=False, limit=limit or PICTURES))

    model, prepared = _ready(model_or_path, processor, "image", device, dtype, trust_remote_code)
    return _measured(model, sources, measure, device)


def evaluate_answers(
    model_or_path: Any,
    sources: Sequence[str],
    limit: int | None = None,
    processor: Any = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, AnswerQuality]:
    """Exact match and answer perplexity of a multimodal model on each of `sources`: `zoo:shapes-vqa`, or a .jsonl
    file of questions with answers; up to `limit` questions of each (all of a file).
    """

    def measure(model: Any, source: str) -> AnswerQuality:
        return answer_quality(model, prepared, dialogues(source, train=False, limit=limit))

    model, prepared = _ready(model_or_path, processor, "image+text", device, dtype, trust_remote_code)
    return _measured(model, sources, measure, device)


def _ready(
    model_or_path: Any, processor: Any, wanted: Modality, device: str, dtype: str, trust_remote_code: bool
) -> tuple[Any, Any]:
    """(model, its processor), checked to take what will be shown to it."""
    if not isinstance(model_or_path, str):
        model = model_or_path
    else:
        model = load(model_or_path, compute_dtype(dtype, pick_device(device)), trust_remote_code)
    found = modality_of(model)
    if found != wanted:
        raise UsageError(f"this model takes {found}, not {wanted}")
    if processor is None and not isinstance(model_or_path, str):
        raise UsageError("a model in memory needs its processor to be shown pictures")
    return model, processor or load_processor(model_or_path, wanted, trust_remote_code)


def _measured(model: Any, sources: Sequence[str], measure: Callable[[Any, str], Any], device: str) -> dict[str, Any]:
    home = next(model.parameters()).device
    model.to(pick_device(device))
    try:
        return {source: measure(model, source) for source in sources}
    finally:
        model.to(home)
