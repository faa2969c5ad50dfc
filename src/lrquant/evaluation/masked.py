"""Perplexity of a model that fills in masked tokens, on non-overlapping windows of a text."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrquant.calibration.sentences import between, room
from lrquant.errors import UsageError
from lrquant.evaluation.perplexity import Perplexity

SHARE, SEED = 0.15, 0  # of a window's tokens that are masked (BERT §3.1), and which


@torch.no_grad()
def masked_perplexity(
    model: Any,
    tokenizer: Any,
    ids: Tensor,  # (tokens,), without special tokens
    *,
    seqlen: int,
    limit_windows: int | None = None,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """exp of the mean over windows of −log p(token | the window with 15 % of its tokens masked), over masked tokens.

    A fixed seed determines the masked tokens, so that all models predict the same ones.

    Raises:
        UsageError: the text is shorter than one window, or the tokenizer has no mask.
    """
    if tokenizer.mask_token_id is None:
        raise UsageError("the tokenizer has no mask token, which this model needs")
    width = room(tokenizer, seqlen)
    rows = ids[: len(ids) // width * width].view(-1, width)[:limit_windows]
    if len(rows) == 0:
        raise UsageError(f"the evaluation text has {len(ids)} tokens, less than one window of {width}")
    device, losses = next(model.parameters()).device, []
    generator = torch.Generator().manual_seed(SEED)
    for row in rows.split(1):
        order = torch.randperm(width, generator=generator)[: max(1, round(SHARE * width))]
        hidden = row.clone()
        hidden[0, order] = tokenizer.mask_token_id
        window, wanted = between(tokenizer, hidden), between(tokenizer, row)
        masked = window != wanted
        logits = model(input_ids=window.to(device), attention_mask=torch.ones_like(window).to(device)).logits
        losses.append(float(torch.nn.functional.cross_entropy(logits[masked].float().cpu(), wanted[masked])))
        told(1, len(rows))
    mean = sum(losses) / len(losses)
    return Perplexity(math.exp(mean) if mean < 700 else math.inf, len(rows), seqlen, tuple(losses))
