"""Add biases to modules without them, so that RMSNorm models can have a learned shift.

A linear supports a bias. A norm gets a `bias` parameter and a hook that adds it to the norm's output. The engine and
the loader of such checkpoints both call `add_bias_slots`. Plain transformers does not support this, so a checkpoint
that needs it is marked as lrquant's own.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def missing_biases(module: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Those submodules of `module` among `names` that have no bias, each once."""
    return tuple(dict.fromkeys(name for name in names if getattr(module.get_submodule(name), "bias", None) is None))


def add_bias_slots(module: nn.Module, names: Iterable[str]) -> None:
    """Give each named submodule a zero bias of its output's width."""
    for name in names:
        part = module.get_submodule(name)
        weight: Tensor = part.weight  # type: ignore[assignment]
        adds_its_bias = hasattr(part, "bias")  # as linears and LayerNorms do; others know of none
        part.bias = nn.Parameter(torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device))
        if not adds_its_bias:
            part.register_forward_hook(_add_bias)


def _add_bias(part: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + part.bias  # type: ignore[return-value, operator]
