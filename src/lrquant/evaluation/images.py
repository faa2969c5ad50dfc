"""Accuracy of image classifiers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lrquant.calibration.images import Picture, pixels
from lrquant.errors import UsageError


@dataclass(frozen=True)
class ImageAccuracy:
    """Top-1 and top-5 accuracy as shares of images, and the mean cross-entropy."""

    top1: float
    top5: float
    loss: float
    pictures: int


@torch.no_grad()
def image_accuracy(
    model: Any,
    processor: Any,
    chosen: Sequence[Picture],
    batch_size: int = 32,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> ImageAccuracy:
    """Top-1 and top-5 accuracy of `model` on images with classes, and the loss, which shows smaller differences.

    Raises:
        UsageError: an image has no class or an unknown one, or the model is not a classifier.
    """
    labels = torch.tensor([class_index(picture.label, model.config) for picture in chosen])
    if not any(name.endswith("classifier") for name, _ in model.named_children()):
        raise UsageError("this model has no classifier, which accuracy needs")
    device = next(model.parameters()).device
    top1 = top5 = 0
    loss = 0.0
    for start in range(0, len(chosen), batch_size):
        batch, truth = chosen[start : start + batch_size], labels[start : start + batch_size].to(device)
        logits = model(pixel_values=pixels(processor, list(batch)).to(device, model.dtype)).logits.float()
        loss += float(torch.nn.functional.cross_entropy(logits, truth, reduction="sum"))
        best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices  # (pictures, 5)
        hits = best == truth[:, None]
        top1 += int(hits[:, 0].sum())
        top5 += int(hits.any(-1).sum())
        told(len(batch), len(chosen))
    return ImageAccuracy(top1 / len(chosen), top5 / len(chosen), loss / len(chosen), len(chosen))


def class_index(label: int | str | None, config: Any) -> int:
    """The model's number of a class."""
    if label is None:
        raise UsageError("an image has no class: put the images of each class into a folder named after it")
    if isinstance(label, str):
        known = config.label2id
        index = known.get(label, int(label) if label.isdigit() else None)
        if index is None:
            some = ", ".join(list(known)[:6]) + (", …" if len(known) > 6 else "")
            raise UsageError(f"folder {label!r} is not one of the model's {len(known)} classes ({some})")
        label = int(index)
    if label >= config.num_labels:
        raise UsageError(f"class {label}: the model has {config.num_labels} classes")
    return label
