"""Where activations are quantized, without touching model code.

Linear inputs are rounded in a forward pre-hook. Queries, keys and values are rounded in an attention
function registered with transformers, which then calls the attention that the model would have used:
`lrquant_sdpa` ends in SDPA, `lrquant_eager` in the model's own eager attention (Gemma 2's soft-capping
needs it). Modules without an entry in `_SCHEMES` get their attention unchanged, so a model can be left on
these functions for good.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from lrquant.formats.fake_quant import fake_quantize

_SCHEMES: WeakKeyDictionary[nn.Module, QuantizationArgs] = WeakKeyDictionary()
PREFIX = "lrquant_"


def _quantized(module: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
    args = _SCHEMES.get(module)
    return tensors if args is None else tuple(fake_quantize(tensor, args) for tensor in tensors)


def _sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    query, key, value = _quantized(module, query, key, value)
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


def _eager(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    own = sys.modules[type(module).__module__].eager_attention_forward
    return own(module, *_quantized(module, query, key, value), *args, **kwargs)


for _name, _function in (("sdpa", _sdpa), ("eager", _eager)):
    AttentionInterface.register(PREFIX + _name, _function)
    AttentionMaskInterface.register(PREFIX + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])


def route_attention(model: Any) -> bool:
    """Send `model`'s attention through this file. False where the family does not use the registry."""
    current = model.config._attn_implementation
    if current.startswith(PREFIX):
        return True
    if not type(model)._can_set_attn_implementation():
        return False
    model.set_attn_implementation(PREFIX + ("eager" if current == "eager" else "sdpa"))
    return True


def install(
    linears: Mapping[nn.Linear, QuantizationArgs | None],
    attention: Iterable[nn.Module],
    attention_args: QuantizationArgs | None,
) -> list[Any]:
    """Quantize the inputs of `linears`, and attention inputs in the modules of `attention`; returns hook handles."""
    handles = []
    for linear, args in linears.items():
        if args is not None:
            handles.append(linear.register_forward_pre_hook(_input_hook(args)))
    if attention_args is not None:
        _SCHEMES.update(dict.fromkeys(attention, attention_args))
    return handles


def _input_hook(args: QuantizationArgs) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (fake_quantize(inputs[0], args), *inputs[1:])

    return hook


@contextmanager
def quantized_activations(
    block: nn.Module, linears: Mapping[nn.Linear, QuantizationArgs | None], attention_args: QuantizationArgs | None
) -> Iterator[None]:
    """Within, `block` runs with quantized activations; afterwards it is as it was."""
    modules = list(block.modules())
    handles = install(linears, modules, attention_args)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in modules:
            _SCHEMES.pop(module, None)
