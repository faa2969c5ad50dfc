"""Trace a forward pass of a block: inputs and outputs of its linears, norms and attention.

Forward hooks record modules. Attention is recorded where it is computed: in calls of scaled dot-product attention, or,
in models that write it out, in the product before a softmax (queries and keys) and the one after it (values).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lrquant.architectures.targets import experts_alike, is_linear

_PRODUCTS = {torch.matmul, torch.bmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.baddbmm}
_SOFTMAX = {torch.softmax, Tensor.softmax, nn.functional.softmax}


@dataclass(frozen=True)
class Passed:
    """A module's input and output in the traced pass."""

    given: Tensor
    answered: Tensor
    channels: int  # of the output: one for each row of a linear's weight, or each element of a norm's


@dataclass(frozen=True)
class Attention:
    """One computation of softmax(q·k)·v. Leading dimensions count heads (and windows)."""

    query: Tensor  # (heads, tokens, head_dim)
    key: Tensor  # (key heads, tokens, head_dim)
    value: Tensor  # (value heads, tokens, value dim)
    output: Tensor  # (heads, tokens, value dim)


@dataclass
class Trace:
    """What was seen, in the order in which it happened."""

    linears: dict[str, Passed] = field(default_factory=dict)
    norms: dict[str, Passed] = field(default_factory=dict)
    routers: dict[str, Tensor] = field(default_factory=dict)  # other modules with a matrix → what they received
    attention: list[Attention] = field(default_factory=list)
    alike: list[tuple[str, ...]] = field(default_factory=list)  # linears that play the same part in all experts


def trace(block: nn.Module, call: Callable[[], Any]) -> Trace:
    """What happens in `block` while `call()` runs it; with gradients, so that dependencies can be asked for."""
    found = Trace(alike=experts_alike(block))

    def watch(name: str, into: dict[str, Passed], channels: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            given = inputs[0] if inputs else None
            if isinstance(given, Tensor) and _routes(module, given, output):
                found.routers.setdefault(name, given)
            elif isinstance(given, Tensor) and isinstance(output, Tensor) and (is_linear(module) or is_norm(module)):
                into.setdefault(name, Passed(given, output, channels))

        return hook

    handles = []
    for name, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if is_linear(module):
            handles.append(module.register_forward_hook(watch(name, found.linears, module.out_features)))
        elif isinstance(weight, Tensor):
            handles.append(module.register_forward_hook(watch(name, found.norms, weight.numel())))
    try:
        with torch.enable_grad(), _AttentionWatch(found.attention):
            call()
    finally:
        for handle in handles:
            handle.remove()
    return found


def is_norm(module: nn.Module) -> bool:
    """Whether `module` may be a norm: it has a gain, perhaps a bias, and nothing else."""
    names = {name for name, _ in module.named_parameters()}
    weight = getattr(module, "weight", None)
    return names in ({"weight"}, {"weight", "bias"}) and isinstance(weight, Tensor) and 1 <= weight.ndim <= 2


def _routes(module: nn.Module, given: Tensor, output: Any) -> bool:
    """Whether `module` may multiply `given` by a matrix without being an ordinary linear, as routers do."""
    weight: Any = module.weight
    if isinstance(output, Tensor) and (is_linear(module) or output.shape == given.shape):
        return False
    return bool(given.is_floating_point() and weight.ndim == 2 and weight.shape[1] == given.shape[-1])


class _AttentionWatch(TorchFunctionMode):
    """Notes every attention that is computed."""

    def __init__(self, found: list[Attention]) -> None:
        super().__init__()
        self.found = found
        self.products: list[tuple[Tensor, Tensor, Tensor]] = []  # left, right, result
        self.weights: list[tuple[Tensor, Tensor, Tensor]] = []  # softmax's result, and the q and k behind it

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function is nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            self._note(named["query"], named["key"], named["value"], result)
        elif function in _SOFTMAX:
            self._softmax(result)
        elif function in _PRODUCTS:
            left, right = args[-2:] if len(args) >= 2 else (kwargs.get("batch1"), kwargs.get("batch2"))
            if isinstance(left, Tensor) and isinstance(right, Tensor):
                self._product(left, right, result)
        return result

    def _softmax(self, result: Tensor) -> None:
        sinks = (0, 1)  # columns that scores may be given more: attention sinks
        behind = (
            one
            for one in reversed(self.products)
            if result.ndim >= 3
            and one[2].shape[-2] == result.shape[-2]
            and result.shape[-1] - one[2].shape[-1] in sinks
        )
        product = next(behind, None)
        if product is not None:
            self.weights.append((result, product[0], product[1].transpose(-1, -2)))

    def _product(self, left: Tensor, right: Tensor, result: Tensor) -> None:
        for weights, query, key in reversed(self.weights):
            if _same_storage(left, weights):
                self._note(query, key, right, result)
                return
        self.products.append((left, right, result))

    def _note(self, *tensors: Tensor) -> None:
        if all(tensor.ndim >= 3 for tensor in tensors):
            self.found.append(Attention(*(tensor.flatten(0, -3) for tensor in tensors)))


def _same_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
