"""Models without weights, on the meta device, for checks before a run."""

from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import nn

from lrquant.architectures.targets import is_exposed
from lrquant.runtime.compat import initialize

_Module = TypeVar("_Module", bound=nn.Module)


def skeleton_of(module: _Module) -> _Module:
    """A copy of `module` whose tensors have shapes and no values; no weight is copied on the way."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return deepcopy(module, memo)


def fills_weights(model: nn.Module, path: str, linears: tuple[str, ...]) -> bool:
    """Whether transformers' code initializes the weights of `linears` of the block at `path` when it has loaded them.

    Some classes do so without asking whether there is a weight (Falcon's linears, Mamba's mixers, CLIP's attention),
    and stumble over packed ones. Tried on a copy without these weights.
    """
    block = skeleton_of(model.get_submodule(path))
    for name in linears:
        del block.get_submodule(name).weight
    owner = _owner(model, path)
    for module in block.modules():
        if is_exposed(module):  # transformers' own code has whole tensors there
            continue
        try:
            initialize(owner, module)
        except AttributeError:
            return True
    return False


def _owner(model: nn.Module, path: str) -> nn.Module:
    """The innermost transformers model around the module at `path`: it initializes what is in it."""
    from transformers import PreTrainedModel

    parts = path.split(".")
    above = (model.get_submodule(".".join(parts[:count])) for count in range(len(parts) - 1, 0, -1))
    return next((module for module in above if isinstance(module, PreTrainedModel)), model)
