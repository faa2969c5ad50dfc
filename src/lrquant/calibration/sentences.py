"""Text for encoders: windows with the tokenizer's special tokens, and padding masks.

Calibration samples are full windows without padding, whose hidden states would enter statistics and losses although
nothing reads them. Evaluation uses batches of texts of any length, padded at the end.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lrquant.calibration.text import calibration_samples, read_text
from lrquant.errors import UsageError

SHORTEST = 24  # characters of a sentence that is worth comparing


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """(tokens that the tokenizer sets before a text, those behind it)."""
    bare = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    whole = list(tokenizer("a", verbose=False)["input_ids"])
    start = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    return whole[:start], whole[start + len(bare) :]


def between(tokenizer: Any, rows: Tensor) -> Tensor:  # (rows, tokens)
    """`rows` with the special tokens at their ends."""
    before, behind = (torch.tensor(each, dtype=rows.dtype).expand(len(rows), -1) for each in special_tokens(tokenizer))
    return torch.cat([before, rows, behind], 1)


def room(tokenizer: Any, seqlen: int) -> int:
    """Tokens of text in a window of `seqlen`, or of as many as the tokenizer says that the model takes.

    Raises:
        UsageError: nothing is left beside the special tokens.
    """
    most = min(seqlen, tokenizer.model_max_length)  # positions of RoBERTa's kind count from two
    left = most - sum(map(len, special_tokens(tokenizer)))
    if left < 1:
        raise UsageError(f"seqlen {seqlen} is too short for the special tokens")
    return left


def sentence_samples(tokenizer: Any, source: str, nsamples: int, *, seqlen: int, seed: int) -> list[dict[str, Any]]:
    """Keyword arguments of `nsamples` calls with one window each, (1, seqlen), special tokens among them.

    Raises:
        UsageError: the text holds too few tokens.
    """
    rows = calibration_samples(tokenizer, source, nsamples, room(tokenizer, seqlen), seed)
    windows = [between(tokenizer, row) for row in rows]
    return [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows]


def sentences(source: str, count: int) -> list[str]:
    """Up to `count` different paragraphs of the evaluation text `source`, in its order.

    Raises:
        UsageError: there are fewer than two.
    """
    pieces = (" ".join(piece.split()) for text in read_text(source, train=False) for piece in text.split("\n\n"))
    found = list(dict.fromkeys(piece for piece in pieces if len(piece) >= SHORTEST))[:count]
    if len(found) < 2:
        raise UsageError(f"{source}: fewer than two paragraphs; there is nothing to compare")
    return found


def batches(tokenizer: Any, texts: Sequence[str], *, batch: int, seqlen: int) -> Iterator[dict[str, Tensor]]:
    """Keyword arguments of calls with `batch` texts each: padded, masked, cut to `seqlen` tokens."""
    for start in range(0, len(texts), batch):
        yield dict(
            tokenizer(
                list(texts[start : start + batch]), padding=True, truncation=True, return_tensors="pt",
                max_length=min(seqlen, tokenizer.model_max_length),
            )
        )  # fmt: skip
