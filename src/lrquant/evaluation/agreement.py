"""Compare a model's predictions with those of its original, on non-overlapping windows of a text.

Perplexity compares with the text, and on a small set a worse model can be better by chance. The original's predictions
are more informative: there is a full distribution to compare at every position.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrquant.errors import UsageError
from lrquant.losses import divergence
from lrquant.runtime.distributed import ALONE, Ranks


@dataclass(frozen=True)
class Agreement:
    """Means over all predictions of all windows.

    divergence: KL(p ‖ q) in nats, p the original's probabilities of the next token, q the model's.
    top1: the share of positions at which both find the same token most probable.
    """

    divergence: float
    top1: float
    windows: int
    seqlen: int


@torch.no_grad()
def agreement(
    model: Any,
    original: Any,
    rows: Tensor,  # (windows, tokens)
    *,
    told: Callable[[int, int], None] = lambda done, total: None,
    ranks: Ranks = ALONE,
) -> Agreement:
    """Divergence of `model` from `original` on windows of a text (`perplexity.windows_of`), one at a time.

    Both are on one device. Each rank takes its share of the windows; all get the values.

    Raises:
        UsageError: the models have vocabularies of different sizes.
    """
    device = next(model.parameters()).device
    mine = rows[ranks.rank :: ranks.world]
    found: list[list[float]] = []
    for row in mine.to(device).split(1):
        ours, theirs = (each(input_ids=row, use_cache=False).logits[:, :-1] for each in (model, original))
        if ours.shape != theirs.shape:
            raise UsageError(
                f"the vocabularies have {ours.shape[-1]} and {theirs.shape[-1]} tokens; "
                f"compare a model with its original"
            )
        same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
        found.append([float(divergence(ours, theirs)), float(same)])
        told(1, len(mine))
    everything = torch.tensor(found, dtype=torch.float64).view(-1, 2)
    if not ranks.alone:
        everything = ranks.in_order(everything, len(rows))
    mean = everything.mean(0)
    return Agreement(float(mean[0]), float(mean[1]), len(rows), rows.shape[1])
