"""What the scripts that train the zoo's models share: one step of descent, pixels, and what is written at the end."""

import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

Curve = list[dict[str, Any]]


def pixels_of(images: Sequence[Image.Image]) -> Tensor:
    """(pictures, 3, height, width) in [−1, 1], as the zoo's image processors make them."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


class Descent:
    """AdamW with a short warm-up and a cosine that ends a little after `steps`; gradients have norm 1 at most."""

    def __init__(self, learned: Sequence[Tensor], steps: int, learning_rate: float) -> None:
        self.learned = learned
        self.optimizer = torch.optim.AdamW(learned, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, 150, int(steps * 1.02))

    def step(self, loss: Tensor) -> None:
        descend(loss, self.learned, self.optimizer, self.schedule)


def descend(loss: Tensor, learned: Sequence[Tensor], optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(learned, 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def save_trained(
    model: Any,
    processor: Any,
    out: Path,
    curve: Curve,
    finish: Callable[[Any], None] = lambda copy: None,
    **facts: Any,
) -> None:
    """Write a bfloat16 copy of `model`, changed by `finish`, with its processor, its curve and how it was made."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    finish(copy)
    copy.bfloat16().config.dtype = torch.bfloat16
    copy.save_pretrained(out)
    processor.save_pretrained(out)
    facts = {"python": platform.python_version(), **facts, "curve": curve}
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
