"""A frozen block as named tensors and back, in no exporter's format.

    codes:LINEAR          integers, or numbers of eight bits, (out, in), one in a byte
    nibbles:LINEAR        codes of at most four bits, (out, in / 2), two in a byte
    scale:LINEAR          (rows of groups, groups), in float32
    zero:LINEAR           the same shape, int8
    global_scale:LINEAR   (1,)
    static:NAME           scales that calibration found, (1,) each
    dense:NAME            parameters that stay in floating point

Codes, scales and zero points are those that training saw, so whatever is exported later needs no second rounding.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lrquant.formats import NumberFormat, Scheme, format_of
from lrquant.formats.fake_quant import QuantizedWeight
from lrquant.formats.layout import product_dtype
from lrquant.formats.nibbles import from_nibbles, to_nibbles
from lrquant.reconstruction.block_parameters import FrozenBlock


def tensors_of(frozen: FrozenBlock) -> dict[str, Tensor]:
    """Everything that `frozen_block` needs, by the names above."""
    tensors = {f"dense:{name}": tensor for name, tensor in frozen.dense.items()}
    tensors |= {f"static:{name}": scale for name, scale in frozen.static_scales.items()}
    for linear, weight in frozen.weights.items():
        if weight.format.bits <= 4 and weight.codes.shape[1] % 2 == 0:
            tensors[f"nibbles:{linear}"] = to_nibbles(weight.codes)
        else:
            tensors[f"codes:{linear}"] = weight.codes
        parts = {"scale": weight.scale, "zero": weight.zero, "global_scale": weight.global_scale}
        tensors |= {f"{part}:{linear}": tensor for part, tensor in parts.items() if tensor is not None}
    return tensors


def frozen_block(tensors: Mapping[str, Tensor], scheme: Scheme, storage_dtype: torch.dtype) -> FrozenBlock:
    """The block behind `tensors_of`; `scheme` calls its linears by their names within it. Other names are ignored."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, of = name.partition(":")
        parts.setdefault(part, {})[of] = tensor
    weights = {}
    for linear, scale in parts.get("scale", {}).items():
        args = scheme.of(linear).weights
        assert args is not None
        format = format_of(args)
        weights[linear] = QuantizedWeight(
            _codes(parts, linear, format),
            scale,
            parts.get("zero", {}).get(linear),
            format,
            parts.get("global_scale", {}).get(linear),
        )
    products = product_dtype(scheme, storage_dtype)
    return FrozenBlock(weights, parts.get("dense", {}), products, parts.get("static", {}))


def _codes(parts: Mapping[str, Mapping[str, Tensor]], linear: str, format: NumberFormat) -> Tensor:
    if linear in parts.get("codes", {}):
        return parts["codes"][linear]
    return from_nibbles(parts["nibbles"][linear], format.elements.encode(torch.zeros(1)).dtype)
