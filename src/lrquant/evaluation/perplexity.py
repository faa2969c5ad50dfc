"""Perplexity of a causal language model on non-overlapping windows of a text."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lrquant.calibration.text import windows
from lrquant.errors import UsageError
from lrquant.runtime.distributed import ALONE, Ranks

BATCH_TOKENS = 4096  # that go through the model at once


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean over windows of a window's mean negative log-likelihood over seqlen − 1 predictions."""

    value: float
    windows: int
    seqlen: int
    window_losses: tuple[float, ...] = field(default=(), repr=False)  # mean negative log-likelihood of each window
    bos: bool = False  # whether every window began with the BOS token


def windows_of(ids: Tensor, seqlen: int, limit_windows: int | None, *, lead: int | None = None) -> Tensor:
    """`ids` (tokens,) cut into windows, (windows, seqlen), each behind the token `lead` where there is one.

    A last, shorter piece is left out.

    Raises:
        UsageError: the text is shorter than one window.
    """
    rows = windows(ids, seqlen, lead)[:limit_windows]
    if len(rows) == 0:
        raise UsageError(f"the evaluation text has {len(ids)} tokens, less than one window of {seqlen}")
    return rows


@torch.no_grad()
def perplexity(
    model: Any,
    ids: Tensor,  # (tokens,)
    seqlen: int,
    limit_windows: int | None = None,
    told: Callable[[int, int], None] = lambda done, total: None,
    ranks: Ranks = ALONE,
    lead: int | None = None,
) -> Perplexity:
    """Perplexity of `model` on `ids` cut into windows of `seqlen`; a last, shorter piece is left out.

    Every window begins with the token `lead`, if one is given; it is not predicted. `limit_windows` limits the number
    of windows, from the beginning. Each rank evaluates its share of them; all get the result.

    Raises:
        UsageError: the text is shorter than one window.
    """
    rows = windows_of(ids, seqlen, limit_windows, lead=lead)
    device = next(model.parameters()).device
    losses: list[float] = []
    mine = rows[ranks.rank :: ranks.world]
    for batch in mine.split(max(1, BATCH_TOKENS // seqlen)) if len(mine) else ():
        batch = batch.to(device)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()  # (windows, seqlen − 1, vocabulary)
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        losses += each.view(len(batch), -1).mean(1).tolist()
        told(len(batch), len(mine))
    if not ranks.alone:
        losses = ranks.in_order(torch.tensor(losses, dtype=torch.float64), len(rows)).tolist()
    mean = sum(losses) / len(losses)
    return Perplexity(math.exp(mean) if mean < 700 else math.inf, len(rows), seqlen, tuple(losses), lead is not None)
