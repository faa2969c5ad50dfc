"""Quantize activations without changing model code.

A forward pre-hook quantizes the inputs of linears. An attention function registered with transformers quantizes
queries, keys and values, and then calls the attention that the model would have used: `lrquant_sdpa` calls SDPA,
`lrquant_eager` the model's own eager attention (which Gemma 2's soft-capping needs). In modules without the attribute
`_SCHEME`, attention is unchanged, so a model can keep using these functions.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from lrquant.formats.fake_quant import fake_quantize
from lrquant.formats.number_format import NumberFormat
from lrquant.formats.presets import format_of
from lrquant.formats.schemes import AttentionScheme
from lrquant.runtime import compat

_SCHEME = "_lrquant_attention"  # the attribute of an attention module that says how its inputs are rounded
_GLOBAL_SCALE = "_lrquant_global_scale"  # a linear's: its input's global scale, once it is calibrated
_CACHE_SCALES = "_lrquant_cache_scales"  # an attention module's: of its keys and values, once they are calibrated
_SEEN = "_lrquant_seen"  # an attention module's: who is told of queries, keys and values before they are rounded
CACHE_SCALES = (".k_scale", ".v_scale")  # what checkpoints call them, behind an attention module's name
PREFIX = "lrquant_"


def _quantized(module: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
    formats = getattr(module, _SCHEME, None)
    if formats is None:
        return tensors
    seen = getattr(module, _SEEN, None)
    if seen is not None:
        seen(*tensors)
    scales = (None, *getattr(module, _CACHE_SCALES, (None, None)))
    return tuple(
        tensor if format is None else _rounded(tensor, format, _product_dtype(tensor), scale)
        for tensor, format, scale in zip(tensors, formats, scales, strict=True)
    )


def _sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # Attention's backward on a CPU is twice as fast in float32 as in bfloat16 (torch 2.13).
        with torch.autocast("cpu", enabled=False):
            query, key, value = _quantized(module, query.float(), key.float(), value.float())
            return sdpa_attention_forward(module, query, key, value, *args, **kwargs)
    query, key, value = _quantized(module, query, key, value)
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


def _eager(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    own = sys.modules[type(module).__module__].eager_attention_forward
    return own(module, *_quantized(module, query, key, value), *args, **kwargs)


for _name, _function in (("sdpa", _sdpa), ("eager", _eager)):
    AttentionInterface.register(PREFIX + _name, _function)
    AttentionMaskInterface.register(PREFIX + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])


def route_attention(model: Any) -> bool:
    """Route `model`'s attention through this file; returns False if the family does not use the registry."""
    current = compat.attention_implementation(model)
    if current.startswith(PREFIX):
        return True
    if not compat.can_choose_attention(model):
        return False
    model.set_attn_implementation(PREFIX + ("eager" if current == "eager" else "sdpa"))
    return True


def set_static_scale(block: nn.Module, name: str, scale: Tensor) -> None:
    """Set the calibrated scale, (1,), that checkpoints call `name` within `block`.

    It is that of a linear's input, `linear.input_scale`, or of keys and values, `attention.k_scale` and `.v_scale`.
    """
    owner, _, kind = name.rpartition(".")
    module = vars(block.get_submodule(owner))
    if f".{kind}" in CACHE_SCALES:
        scales = list(module.get(_CACHE_SCALES, (None, None)))
        scales[CACHE_SCALES.index(f".{kind}")] = scale.cpu()
        module[_CACHE_SCALES] = tuple(scales)
    else:
        module[_GLOBAL_SCALE] = scale.cpu()


def cache_scales_of(block: nn.Module) -> dict[str, Tensor]:
    """The calibrated scales of keys and values within `block`, by name."""
    return {
        f"{name}{part}": scale
        for name, module in block.named_modules()
        for part, scale in zip(CACHE_SCALES, getattr(module, _CACHE_SCALES, ()), strict=False)
    }


@contextmanager
def watched_attention(block: nn.Module, told: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """A context in which `told(name, keys, values)` is called for every quantized attention module of `block`."""
    modules = {name: module for name, module in block.named_modules() if hasattr(module, _SCHEME)}
    for name, module in modules.items():
        vars(module)[_SEEN] = lambda _, key, value, name=name: told(name, key, value)
    try:
        yield
    finally:
        for module in modules.values():
            del vars(module)[_SEEN]


def attention_modules(
    modules: Iterable[nn.Module], linears: Mapping[Any, QuantizationArgs | None], scheme: AttentionScheme
) -> list[nn.Module]:
    """Those of `modules` whose attention inputs are quantized.

    Where the inputs of all linears within a module stay in floating point, its queries, keys and values do so too. A
    quantized cache is every block's.
    """
    if scheme.queries is None:
        return list(modules)
    formats = ((module, [linears[each] for each in module.modules() if each in linears]) for module in modules)  # type: ignore[index]
    return [module for module, inside in formats if not inside or any(inside)]


def install(
    linears: Mapping[nn.Linear, QuantizationArgs | None],
    attention: Iterable[nn.Module],
    attention_scheme: AttentionScheme | None,
) -> list[Any]:
    """Quantize the inputs of `linears`, and attention inputs in the modules of `attention`; returns hook handles."""
    handles = []
    latest = _Latest()
    for linear, args in linears.items():
        if args is not None:
            handles.append(linear.register_forward_pre_hook(_input_hook(format_of(args), latest)))
    if attention_scheme is not None:
        queries, cache = (
            None if args is None else format_of(args) for args in (attention_scheme.queries, attention_scheme.cache)
        )
        for module in attention_modules(attention, linears, attention_scheme):
            setattr(module, _SCHEME, (queries, cache, cache))
    return handles


class _Latest:
    """The input quantized last, for the linears that share it: queries, keys and values, or gate and up."""

    def __init__(self) -> None:
        self.key: tuple[Any, ...] = ()
        self.source: Any = lambda: None
        self.result: Tensor | None = None

    def quantized(self, x: Tensor, format: NumberFormat, global_scale: Tensor | None) -> Tensor:
        # A graph finds what its parts share; in inference a tensor has no version by which a change would show.
        if torch.compiler.is_compiling() or x.is_inference():
            return _rounded(x, format, _product_dtype(x), global_scale)
        known = None if global_scale is None else float(global_scale)
        key = (x._version, format, _product_dtype(x), torch.is_grad_enabled(), known)
        if self.source() is not x or self.key != key or self.result is None:
            self.result = _rounded(x, format, _product_dtype(x), global_scale)
            self.source, self.key = ref(x), key
        return self.result


def _rounded(
    x: Tensor, format: NumberFormat, product: torch.dtype | None, global_scale: Tensor | None = None
) -> Tensor:
    """`x` on its grid, in the precision of the product it goes into.

    Under autocast, inputs arrive in the precision of the previous product, which is too coarse to compute scales.
    """
    global_scale = None if global_scale is None else global_scale.to(x.device)
    return fake_quantize(x if product is None else x.float(), format, product, global_scale)


def _product_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would turn `x` into for a matrix product; None: it stays."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _input_hook(format: NumberFormat, latest: _Latest) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (latest.quantized(inputs[0], format, getattr(module, _GLOBAL_SCALE, None)), *inputs[1:])

    return hook


@contextmanager
def quantized_activations(
    block: nn.Module, linears: Mapping[nn.Linear, QuantizationArgs | None], attention_scheme: AttentionScheme | None
) -> Iterator[None]:
    """A context in which `block` runs with quantized activations."""
    modules = list(block.modules())
    handles = install(linears, modules, attention_scheme)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in modules:
            vars(module).pop(_SCHEME, None)
