"""Train the bundled ViT: `python -m lrquant.zoo.scripts.train_vit OUT_DIR [--steps N]`.

About a quarter of an hour on one idle CPU core. A quarter of a million parameters in six blocks, 48 × 48 pixels in
patches of 8. Every picture is drawn for one step only, so there is nothing to overfit, and is smaller, noisier and
more cluttered than those of `zoo:shapes`; accuracy on such pictures that were held out is written beside the weights
(`training.json`), so that anybody can see whether the curve has flattened.

A network trained for minutes has none of the outlier channels that large ones are known for, and four bits cost it
nothing. What is written therefore has some grown into it, which changes no answer (`outliers`).
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from lrquant.zoo.scripts.outliers import grow_outliers
from lrquant.zoo.scripts.patch_teacher import PatchTeacher
from lrquant.zoo.scripts.training import Curve, Descent, pixels_of, save_trained
from lrquant.zoo.shapes import CLASSES, SIZE, Placed, class_of, draw_picture, seeds

HELD_OUT = 1000
PATCH = 8


def batch_of(train: bool, count: int, start: int = 0) -> tuple[Tensor, Tensor, list[list[Placed]]]:
    """Pixels (count, 3, SIZE, SIZE) in [−1, 1], as the processor makes them, classes (count,), what was drawn."""
    images, drawn = zip(*(draw_picture(seed, harder=True) for seed in seeds(train, count, start)), strict=True)
    labels = torch.tensor([class_of(placed) for placed in drawn])
    return pixels_of(images), labels, [[placed] for placed in drawn]


@torch.no_grad()
def accuracy(model: ViTForImageClassification, pixels: Tensor, labels: Tensor) -> float:
    model.eval()
    right = sum(
        int((model(pixel_values=part).logits.argmax(-1) == label).sum())
        for part, label in zip(pixels.split(100), labels.split(100), strict=True)
    )
    model.train()
    return right / len(labels)


def with_outliers(model: ViTForImageClassification) -> None:
    grow_outliers(model, factor=8, value_factor=16, share=0.05)


def main(
    out: Annotated[Path, typer.Argument(help="Where the model is written.")],
    steps: int = 4500,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> None:
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=192,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
    )
    model = ViTForImageClassification(config)
    teacher = PatchTeacher(config.hidden_size, PATCH)
    learned = [*model.parameters(), *teacher.parameters()]
    descent = Descent(learned, steps, learning_rate)
    processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})
    held_out = batch_of(False, HELD_OUT)[:2]
    curve: Curve = []
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters", flush=True)
    for step in range(steps + 1):
        if step % 250 == 0 or step == steps:
            curve.append({"step": step, "held_out_accuracy": accuracy(model, *held_out)})
            print(curve[-1], flush=True)
            save_trained(model, processor, out, curve, with_outliers, numpy=np.__version__)
        pixels, labels, drawn = batch_of(True, batch_size, step * batch_size)
        output = model(pixel_values=pixels, labels=labels, output_hidden_states=True)
        descent.step(output.loss + teacher.loss(output.hidden_states[-1][:, 1:], drawn))


if __name__ == "__main__":
    typer.run(main)
