"""Frozen blocks as the tensors of a compressed-tensors checkpoint, packed from their integers.

| stored as (formats/layout.py) | a linear's codes |
|---|---|
| `pack-quantized` | `weight_packed`: `bits` bits each in int32 words, across their borders; `weight_shape` |
| `nvfp4-pack-quantized`, `mxfp4-pack-quantized` | `weight_packed`: two in a byte |
| `int-quantized`, `float-quantized`, `naive-quantized`, `mxfp8-quantized` | `weight`: one in a byte |
| any other | as compressed-tensors' own packer makes them, of the dequantized weight |

Codes, scales and zero points are those that the block was learned with. Only the last row rounds again, and the result
is checked against the codes.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor, nn

from lrquant.errors import LrquantError
from lrquant.export.whole_weights import needs_whole_weights
from lrquant.formats import Scheme
from lrquant.formats.fake_quant import QuantizedWeight
from lrquant.formats.layout import pads_zero_points, storage_format
from lrquant.formats.nibbles import to_nibbles
from lrquant.reconstruction.block_parameters import FrozenBlock, buffers_of
from lrquant.reconstruction.result import Reconstruction


def _in_words(weight: QuantizedWeight) -> dict[str, Tensor]:
    codes, bits = weight.codes, weight.format.bits
    rows, columns = codes.shape
    packed = {"weight_packed": _words(codes, bits), "weight_shape": torch.tensor([rows, columns])}
    if weight.zero is not None:
        packed["weight_zero_point"] = _words(weight.zero.T, bits).T
    return packed


def _words(codes: Tensor, bits: int) -> Tensor:
    """Each row's codes, `bits` bits each."""
    if codes.is_meta:  # compressed-tensors looks at values
        return codes.new_empty((len(codes), math.ceil(codes.shape[1] * bits / 32)), dtype=torch.int32)
    return pack_to_int32(codes, bits)


def _in_nibbles(weight: QuantizedWeight) -> dict[str, Tensor]:
    return {"weight_packed": to_nibbles(weight.codes)}


def _in_bytes(weight: QuantizedWeight) -> dict[str, Tensor]:
    zero = {} if weight.zero is None else {"weight_zero_point": weight.zero}
    return {"weight": weight.codes} | zero


_CODES: dict[CompressionFormat, Callable[[QuantizedWeight], dict[str, Tensor]]] = {
    CompressionFormat.pack_quantized: _in_words,
    CompressionFormat.int_quantized: _in_bytes,
    CompressionFormat.float_quantized: _in_bytes,
    CompressionFormat.naive_quantized: _in_bytes,
    CompressionFormat.mxfp8_quantized: _in_bytes,
    CompressionFormat.nvfp4_pack_quantized: _in_nibbles,
    CompressionFormat.mxfp4_pack_quantized: _in_nibbles,
}


def pack_weight(
    weight: QuantizedWeight, scheme: Scheme, storage_dtype: torch.dtype, *, whole: bool = False
) -> dict[str, Tensor]:
    """A linear's tensors by name within it; `scheme` is its own, `whole` as in `formats.layout.storage_format`."""
    stored, scales = storage_format(scheme, whole), weight.format.scales
    if stored not in _CODES:
        return _packed_by_library(weight, scheme, stored)
    packed = {"weight_scale": scales.on_disk(weight.scale, weight.global_scale, storage_dtype)}
    if weight.global_scale is not None:
        packed[f"weight{scales.global_name}"] = weight.global_scale
    packed |= _CODES[stored](weight)
    zero = packed.get("weight_zero_point")
    if zero is not None and pads_zero_points(scheme, whole):
        packed["weight_zero_point"] = nn.functional.pad(zero, (0, 0, 0, weight.scale.shape[0] - zero.shape[0]))
    elif zero is not None and zero.shape[0] == 1:
        # Of few rows; compressed-tensors 0.18 to 0.20 cannot unpack zero points that lie in a single one.
        packed["weight_zero_point"] = nn.functional.pad(zero, (0, 0, 0, 1))
    return {name: tensor.contiguous() for name, tensor in packed.items()}


def _packed_by_library(weight: QuantizedWeight, scheme: Scheme, stored: CompressionFormat) -> dict[str, Tensor]:
    given = {"weight": weight.dequantized(), "weight_scale": weight.scale.float()}
    given |= {} if weight.zero is None else {"weight_zero_point": weight.zero}
    packer = BaseCompressor.get_value_from_registry(stored.value)
    quantization = QuantizationScheme(targets=[], weights=scheme.weights)
    packed = packer.compress(given, quantization)
    if not weight.codes.is_meta:
        again = packer.decompress(packed, quantization)["weight"].float()
        if not torch.equal(again, given["weight"].to(again.dtype)):
            raise LrquantError(f"compressed-tensors packs {stored.value} weights with other values than were learned")
    return {name: tensor.contiguous() for name, tensor in packed.items()}


@dataclass
class Packer:
    """Packs `model`'s frozen blocks in `scheme`, and counts what their quantized weights take."""

    model: nn.Module
    scheme: Scheme
    storage_dtype: torch.dtype
    weights: int = 0  # quantized ones so far
    bits: int = 0  # that these take, scales and zero points included

    def block(self, path: str, frozen: FrozenBlock, buffers: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The block's tensors under their full names; `buffers` are those of the model's block unless given."""
        if buffers is None:
            buffers = buffers_of(self.model.get_submodule(path), self.storage_dtype)
        packed = self._packed(frozen, self.scheme.within(path), whole=needs_whole_weights(self.model, path))
        return {f"{path}.{name}": tensor for name, tensor in (*buffers.items(), *packed.items())}

    def blocks(self, result: Reconstruction) -> Iterator[dict[str, Tensor]]:
        """`block` of a result that lies in memory, one after the other."""
        for path, frozen in zip(result.block_paths, result.frozen, strict=True):
            yield self.block(path, frozen)

    def outside(
        self, result: Reconstruction, read: Callable[[str], Tensor] | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """The tensors outside the blocks, in the storage dtype where they were not rounded.

        They come in one piece; with `read`, which gives those that are not in memory, one at a time.
        """
        inside = tuple(f"{path}." for path in result.block_paths)
        tied: Mapping[str, str] = getattr(self.model, "all_tied_weights_keys", None) or {}
        rounded = {f"{name}.weight" for name in result.outside.weights if self.scheme.weights is not None}
        dense = {
            name: tensor
            for name, tensor in self.model.state_dict().items()
            if not name.startswith(inside) and name not in tied and name not in rounded
        }
        frozen = FrozenBlock(result.outside.weights, {})
        packed = self._packed(frozen, self.scheme, whole=needs_whole_weights(self.model, ""))
        if read is None:
            yield {name: self._stored(tensor) for name, tensor in dense.items()} | packed
            return
        yield packed
        for name, tensor in dense.items():
            yield {name: self._stored(read(name) if tensor.is_meta else tensor)}

    def _packed(self, frozen: FrozenBlock, scheme: Scheme, *, whole: bool) -> dict[str, Tensor]:
        """Tensors by their names within the block, which is how `scheme` calls its linears."""
        tensors = dict(frozen.dense) | dict(frozen.static_scales)
        if scheme.weights is None:
            return tensors
        for linear, weight in frozen.weights.items():
            packed = pack_weight(weight, scheme.of(linear), self.storage_dtype, whole=whole)
            self.weights += weight.codes.numel()
            self.bits += 8 * sum(tensor.nbytes for name, tensor in packed.items() if name != "weight_shape")
            tensors |= {f"{linear}.{name}": tensor for name, tensor in packed.items()}
        return tensors

    def _stored(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.storage_dtype) if tensor.is_floating_point() else tensor
