"""Token ids of the texts that this process tokenized last.

A demo quantizes with five methods, and an evaluation measures two models, on one text. Tokenizing it takes longer than
a small model's blocks.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import Tensor

MOST_TEXTS, MOST_CHARACTERS = 4, 16 << 20  # kept at the same time; of a text that is kept


@dataclass(frozen=True)
class _Text:
    """What token ids depend on; `tokenize` makes them."""

    digest: bytes
    tokenize: Callable[[], Tensor] = field(compare=False)


@lru_cache(maxsize=MOST_TEXTS)
def _ids(text: _Text) -> Tensor:
    return text.tokenize()


def remembered(tokenizer: Any, text: str, *, special: bool, tokenize: Callable[[], Tensor]) -> Tensor:
    """`tokenize()`, (tokens,), or what it returned for the same text, tokenizer and choice of special tokens.

    Only fast tokenizers, whose complete state can be compared, and texts of moderate length are remembered.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or len(text) > MOST_CHARACTERS:
        return tokenize()
    digest = hashlib.sha256(f"{type(tokenizer).__qualname__} {special}\n{backend.to_str()}\n".encode())
    digest.update(text.encode("utf-8", "surrogatepass"))
    return _ids(_Text(digest.digest(), tokenize)).clone()
