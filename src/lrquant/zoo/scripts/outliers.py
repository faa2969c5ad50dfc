"""Outlier channels without a change of function: activations of large models have them, those of small ones do not.

A few channels of each norm's output are multiplied by a factor, and the columns of the weights that read them
divided by it, through the same equivalent transformations that smoothing uses; likewise, where asked, a few
channels of the values in attention. In full precision nothing changes (a power of two does not even change
the rounding of stored weights); rounding activations becomes much harder, because a large channel sets every
token's range.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrquant.architectures import family_of
from lrquant.transforms import NormToLinears, ValueToOutput, materialize, reparameterize


@torch.no_grad()
def grow_outliers(
    model: Any,
    factor: float,
    value_factor: float = 1.0,
    share: float = 0.02,
    seed: int = 0,
    towers: Sequence[str] | None = None,
) -> None:
    """Grow a `share` of every norm's channels by `factor`, and of every block's values by `value_factor`.

    The norms' channels are the same in all blocks of a stage, as in large models.
    """
    generator = torch.Generator().manual_seed(seed)
    for stage in family_of(model).stages(model, towers):
        norms: dict[int, Tensor] = {}
        for block in stage.blocks(model):
            params = dict(block.named_parameters())
            changed, learnables = [], {}
            for equivalence in stage.equivalences:
                if isinstance(equivalence, NormToLinears):
                    width = params[f"{equivalence.norm}.weight"].numel()
                    if width not in norms:
                        norms[width] = _scales(width, share, factor, generator)
                    scale = norms[width]
                elif isinstance(equivalence, ValueToOutput) and value_factor != 1:
                    scale = _scales(equivalence.value_rows.numel(), share, value_factor, generator)
                else:
                    continue
                changed.append(equivalence)
                learnables[f"{equivalence.name}.scale"] = scale
            for name, value in materialize(params, reparameterize(params, changed, learnables)).items():
                params[name].copy_(value)


def _scales(width: int, share: float, factor: float, generator: torch.Generator) -> Tensor:
    scales = torch.ones(width)
    scales[torch.randperm(width, generator=generator)[: max(1, int(width * share))]] = 1 / factor
    return scales
