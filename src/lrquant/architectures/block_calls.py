"""Intercept a model's calls of its blocks, to record their arguments."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Enough(Exception):
    """The last block was reached; the head need not run."""


@contextmanager
def answering(blocks: Sequence[nn.Module], answer: Callable[..., Any]) -> Iterator[None]:
    """A context in which block i returns `answer(i, block's own forward, hidden states, other arguments by name)`."""
    originals = [block.forward for block in blocks]
    try:
        for index, block in enumerate(blocks):
            original = originals[index]

            def recorder(*args: Any, _index: int = index, _original: Any = original, **kwargs: Any) -> Any:
                hidden, named = _by_name(_original, args, kwargs)
                return answer(_index, _original, hidden, named)

            block.forward = recorder  # type: ignore[method-assign]
        yield
    finally:
        for block in blocks:
            del block.forward


def _by_name(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """(hidden states, all other arguments by name) of a call of `forward`."""
    bound = inspect.signature(forward).bind(*args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            named[name] = value
    hidden = named.pop(next(iter(bound.signature.parameters)))
    return hidden, named


def without_cache(arguments: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a call, without key–value caches."""
    kept = {name: value for name, value in arguments.items() if not _is_cache(value)}
    return kept | {"use_cache": False} if "use_cache" in kept else kept


def _is_cache(value: Any) -> bool:
    """Whether `value` is a key/value cache, by its class: the argument's name has changed between versions."""
    return type(value).__name__.endswith("Cache")
