"""Capture the inputs of all blocks without computing the blocks.

For one pass, a recorder replaces every block, stores its keyword arguments and returns the hidden states unchanged. The
model's own code then builds masks, rotary embeddings and all other arguments of each block (Gemma's local and global
layers differ), at the cost of an embedding. This works for any family.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrquant.architectures.block_calls import Enough, answering, without_cache
from lrquant.errors import UsageError
from lrquant.runtime.profile import timed


@dataclass
class BlockInputs:
    """Inputs of all blocks for all samples.

    `hidden[i]` is what the first block receives for sample i, (1, tokens, hidden). `arguments[b]` holds the
    keyword arguments of block b: one mapping when all samples share it, else one per sample.
    """

    hidden: Any  # a list of tensors, or a stream of the activation store
    arguments: list[list[dict[str, Any]]]

    def shared(self) -> bool:
        """Whether samples may be batched: all have one shape, and the same arguments, which can be expanded."""
        one_shape = len({hidden.shape for hidden in self.hidden}) == 1 and self.hidden[0].ndim == 3
        return one_shape and all(len(given) == 1 and _expandable(given[0]) for given in self.arguments)

    def fingerprint(self) -> str:
        """Equal on two ranks whose samples could be batched together, if each rank's own can."""
        digest = hashlib.sha256(repr((tuple(self.hidden[0].shape), self.hidden[0].dtype)).encode())
        tensors: list[Tensor] = []
        for given in self.arguments:
            _map_tensors(given[0], tensors.append)
        seen: set[int] = set()
        for tensor in tensors:
            if id(tensor) not in seen:  # blocks mostly share them
                seen.add(id(tensor))
                digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def arguments_of(self, block: int, sample: int, batch: int, *, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of `block` for a batch of `batch` samples that starts with `sample`."""
        per_sample = self.arguments[block]
        chosen = per_sample[0] if len(per_sample) == 1 else per_sample[sample]
        return _map_tensors(chosen, lambda tensor: _for_batch(tensor.to(device), batch))


def _for_batch(tensor: Tensor, batch: int) -> Tensor:
    """Tensors were recorded for one sample. The batch is expanded, not left to broadcasting: Falcon views it."""
    return tensor if batch == 1 or tensor.ndim < 2 else tensor.expand(batch, *tensor.shape[1:])


def _expandable(arguments: dict[str, Any]) -> bool:
    """Whether the first dimension of every tensor is the batch of one; in some models it holds heads as well."""
    tensors: list[Tensor] = []
    _map_tensors(arguments, tensors.append)
    return all(tensor.ndim < 2 or tensor.shape[0] == 1 for tensor in tensors)


def _map_tensors(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_map_tensors(item, change) for item in value)
    return value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one is other or bool(one == other)


@timed("capture")
@torch.no_grad()
def capture(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    samples: Sequence[dict[str, Any]],
    new_stream: Callable[[Tensor], Any] = lambda first: [],
) -> BlockInputs:
    """Inputs of `blocks` when `model` is called with each of `samples` (keyword arguments, batch of one).

    `new_stream` receives the first sample's hidden states and creates the stream to which all are appended.

    Raises:
        UsageError: a block receives other hidden states than the one before it handed on, or is not called.
    """
    hidden: Any = None
    seen = 0
    arguments: list[list[dict[str, Any]]] = [[] for _ in blocks]
    behind: tuple[Any, ...] | None = None  # what a block returns behind its hidden states; None: no tuple
    asked = False
    handed_on: Tensor | None = None

    def record(index: int, original: Any, states: Tensor, kwargs: dict[str, Any]) -> Any:
        nonlocal behind, asked, hidden, seen, handed_on
        kwargs = without_cache(kwargs)
        if index > 0 and states is not handed_on and not _equal(states, handed_on):
            raise UsageError(
                f"the model changes the hidden states between its blocks {index - 1} and {index}, as some models do "
                f"for images; calibrate it on text"
            )
        if index == 0:
            hidden = new_stream(states) if hidden is None else hidden
            hidden.append(states.clone())
            seen += 1
            if not asked:  # of the first block, once: some families wrap what they return
                output = original(states, **kwargs)
                behind, asked = output[1:] if isinstance(output, tuple) else None, True
        known = arguments[index]
        if seen == 1:
            known.append(kwargs)
        elif len(known) > 1 or not _equal(known[0], kwargs):
            known.extend(known[:1] * (seen - 1 - len(known)))
            known.append(kwargs)
        if index == len(blocks) - 1:
            raise Enough
        handed_on = states
        return states if behind is None else (states, *behind)

    with answering(blocks, record):
        for sample in samples:
            try:
                model(**sample)
            except Enough:
                pass
    left_out = [index for index, given in enumerate(arguments) if not given]
    if left_out:
        raise UsageError(f"the calibration samples never reach block {left_out[0]} of {len(blocks)}")
    return BlockInputs(hidden, arguments)


@torch.no_grad()
def tokens_of(model: nn.Module, blocks: Sequence[nn.Module], sample: dict[str, Any]) -> int:
    """Tokens of the hidden states that the first of `blocks` receives when `model` is called with `sample`."""
    found: list[int] = []

    def look(index: int, original: Any, states: Tensor, named: dict[str, Any]) -> Any:
        found.append(states.shape[-2])
        raise Enough

    with answering(blocks[:1], look), suppress(Enough):
        model(**sample)
    return found[0]
