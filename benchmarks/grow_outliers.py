"""A stress model: the same function, with outlier channels in its activations as large models have them.

    python benchmarks/grow_outliers.py zoo:llama OUT_DIR --factor 30

In every block a few channels of each norm's output are multiplied by `factor`, and the columns of the weights that read
them divided by it, through the same equivalent transformation that smoothing uses. In full precision nothing changes;
rounding activations becomes much harder, because the large channels set every token's range.
"""

from pathlib import Path
from typing import Any

import torch
import typer

from lrquant.architectures import family_of
from lrquant.models import load_model, load_tokenizer
from lrquant.transforms import NormToLinears, materialize, reparameterize


@torch.no_grad()
def grow_outliers(model_name: str, out: Path, factor: float, share: float = 0.02, seed: int = 0) -> None:
    """Save `model_name` with a `share` of every norm's channels grown by `factor`, in float32."""
    model: Any = load_model(model_name, torch.float32)
    family = family_of(model)
    equivalences = [e for e in family.equivalences(model.config) if isinstance(e, NormToLinears)]
    generator = torch.Generator().manual_seed(seed)
    width = model.config.hidden_size
    channels = torch.randperm(width, generator=generator)[: max(1, int(width * share))]
    scale = torch.ones(width)
    scale[channels] = 1 / factor
    for block in model.get_submodule(family.blocks):
        params = dict(block.named_parameters())
        learnables = {f"{equivalence.name}.scale": scale for equivalence in equivalences}
        for name, value in materialize(params, reparameterize(params, equivalences, learnables)).items():
            params[name].copy_(value)
    model.save_pretrained(out)
    load_tokenizer(model_name).save_pretrained(out)


if __name__ == "__main__":
    typer.run(grow_outliers)
