"""Where blocks are kept while they are not in use: here in memory, in `lrquant.loading.offload` on disk."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lrquant.runtime.memory import give_back_freed


class BlockSource:
    """Blocks of a model that is entirely in memory.

    Args:
        model: holds the blocks.
        keeps: whether the quantized model in memory will be used; if not, finished blocks are skipped.
    """

    def __init__(self, model: nn.Module, keeps: bool = True) -> None:
        self.model = model
        self.keeps = keeps

    def take(self, path: str) -> nn.Module:
        """The block at `path` with its parameters on the CPU; taking it again changes nothing."""
        return self.model.get_submodule(path)

    def release(self, path: str) -> None:
        """Release the block at `path`, which is finished."""

    def alter(self, path: str, change: Callable[[nn.Module], None]) -> None:
        """Apply `change` to the module at `path`, once, before its weights are used."""
        change(self.model.get_submodule(path))

    def untie(self, name: str, source: str) -> None:
        """Give the parameter `name`, which is the parameter `source`, values of its own."""
        module, _, own = name.rpartition(".")
        copy = self.model.get_parameter(source).detach().clone()
        setattr(self.model.get_submodule(module), own, nn.Parameter(copy, requires_grad=False))


@contextmanager
def held(block_source: BlockSource, path: str, device: torch.device) -> Iterator[nn.Module]:
    """A context in which the block at `path` is on `device`."""
    block = block_source.take(path).to(device)
    try:
        yield block
    finally:
        block.to("cpu")
        block_source.release(path)
        give_back_freed()
