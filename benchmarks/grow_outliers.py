"""A stress model: the same function, with outlier channels in its activations as large models have them.

    python benchmarks/grow_outliers.py zoo:llama OUT_DIR --factor 30

In every block a few channels of each norm's output are multiplied by `factor` (`lrquant.zoo.scripts.outliers`).
"""

from pathlib import Path

import torch
import typer

from lrquant.loading.pretrained import load_model, load_tokenizer
from lrquant.zoo.scripts import outliers


def grow_outliers(model_name: str, out: Path, factor: float, share: float = 0.02, seed: int = 0) -> None:
    """Save `model_name` with a `share` of every norm's channels grown by `factor`, in float32."""
    model = load_model(model_name, torch.float32)
    outliers.grow_outliers(model, factor, share=share, seed=seed)
    model.save_pretrained(out)
    load_tokenizer(model_name).save_pretrained(out)


if __name__ == "__main__":
    typer.run(grow_outliers)
