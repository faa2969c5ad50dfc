"""Frozen blocks as compressed-tensors: tensors under their checkpoint names, and the configuration that reads them."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus
from torch import Tensor, nn

from lrquant._registration import OWN_METHOD
from lrquant.architectures.targets import has_exposed, is_linear, linears_of, mixtures_of
from lrquant.errors import UsageError
from lrquant.export.expert_layout import stored_names
from lrquant.export.skeleton import fills_weights
from lrquant.formats import Scheme, format_of
from lrquant.formats.activation_quant import CACHE_SCALES
from lrquant.formats.fake_quant import QuantizedWeight
from lrquant.formats.layout import dequantized_on_load, packs_numbers, pads_zero_points, product_dtype, storage_format
from lrquant.reconstruction.block_parameters import FrozenBlock
from lrquant.reconstruction.result import Reconstruction
from lrquant.transforms.online import transform_config

# Parts of transformers whose blocks fill their weights in some of the releases that are to read a checkpoint, if not in
# this one: 5.20 to 5.23.
_FILLED_WEIGHTS = (".clip.", ".siglip.")
_NEEDS_WHOLE: dict[type[nn.Module], bool] = {}  # by class, tried once (skeleton.fills_weights)
STATIC_SCALES = (".input_global_scale", ".input_scale", *CACHE_SCALES)  # found in calibration


def needs_whole_weights(model: nn.Module, path: str) -> bool:
    """Whether the block at `path` is one that transformers cannot load with packed weights (see formats.layout).

    A block that stands alone (as `model`, without a path) is known where its class was asked about within a model.
    """
    from transformers import PreTrainedModel

    kind = type(model.get_submodule(path))
    if any(part in kind.__module__ for part in _FILLED_WEIGHTS):
        return True
    if kind not in _NEEDS_WHOLE:
        if not any(isinstance(module, PreTrainedModel) for module in model.modules()):
            return False
        _NEEDS_WHOLE[kind] = fills_weights(model, path, tuple(linears_of(model.get_submodule(path))))
    return _NEEDS_WHOLE[kind]


def check_layout(model: nn.Module, paths: Sequence[str], scheme: Scheme) -> None:
    """Raise when no checkpoint can hold the blocks at `paths` in `scheme`."""
    packed = [path for path in paths if packs_numbers(scheme) and _quantized_in(model, path, scheme)]
    path = next((path for path in packed if needs_whole_weights(model, path)), None)
    if path is not None:
        name = type(model.get_submodule(path)).__name__
        raise UsageError(
            f"{name}: transformers cannot load its weights packed while inputs are quantized; "
            "take a weight-only format, whose name ends in a16, or integers"
        )


def pack_block(
    frozen: FrozenBlock, scheme: Scheme, storage_dtype: torch.dtype, whole: bool = False
) -> dict[str, Tensor]:
    """A block's checkpoint tensors by name within the block, which is how `scheme` calls its linears."""
    tensors = dict(frozen.dense) | dict(frozen.static_scales)
    if scheme.weights is None:
        return tensors
    for linear, weight in frozen.weights.items():
        own = scheme.of(linear)
        packer = BaseCompressor.get_value_from_registry(storage_format(own, whole).value)
        quantization = QuantizationScheme(targets=[], weights=own.weights)
        scales = weight.format.scales
        local = {
            "weight": weight.dequantized(),
            "weight_scale": scales.on_disk(weight.scale, weight.global_scale),
        }
        if weight.zero is not None:
            local["weight_zero_point"] = weight.zero
        if weight.global_scale is not None:
            local[f"weight{scales.global_name}"] = weight.global_scale
        packed = packer.compress(local, quantization)
        if scales.unpacked is None:
            packed["weight_scale"] = packed["weight_scale"].to(storage_dtype)
        if pads_zero_points(own, whole):
            zero = packed["weight_zero_point"]
            packed["weight_zero_point"] = nn.functional.pad(zero, (0, 0, 0, weight.scale.shape[0] - zero.shape[0]))
        elif "weight_zero_point" in packed and packed["weight_zero_point"].shape[0] == 1:
            # Of few rows; compressed-tensors 0.18 to 0.20 cannot unpack zero points that lie in a single one.
            packed["weight_zero_point"] = nn.functional.pad(packed["weight_zero_point"], (0, 0, 0, 1))
        tensors |= {f"{linear}.{name}": tensor.contiguous() for name, tensor in packed.items()}
    return tensors


def quantization_config(model: nn.Module, result: Reconstruction, scheme: Scheme) -> dict[str, Any]:
    """The `quantization_config` entry of config.json.

    Linears whose input is flat, (tokens, width), get a group of their own (see formats.schemes). A
    model that got biases for its shifts, or whose inputs are transformed at run time, is marked with lrquant's own
    method; the biases are listed, the transforms described as compressed-tensors describes them.
    """
    quantized = _quantized_linears(model, result, scheme)
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    groups = _groups_by_linear(model, result, scheme) if scheme.mixed else _groups(model, result, scheme)
    formats = {group.format for group in groups.values()}
    names = stored_names(model, result.own_layout)
    stored = storage_format(scheme) if len(formats) > 1 else next(iter(formats))
    packed = CompressionFormat(stored) is not CompressionFormat.dense
    config = QuantizationConfig(
        config_groups=groups,
        format=CompressionFormat.mixed_precision.value if len(formats) > 1 else CompressionFormat(stored).value,
        quantization_status=QuantizationStatus.COMPRESSED if packed else QuantizationStatus.FROZEN,
        ignore=[
            names.get(name, name) for name in linears if name not in quantized and name not in result.outside.weights
        ],
        kv_cache_scheme=scheme.kv_cache,
    )
    data: dict[str, Any] = config.model_dump(mode="json", exclude={"moe_sparsity_config"})
    data["version"] = compressed_tensors.__version__
    if dequantized_on_load(scheme):
        data["dequantize"] = True
    if result.needs_lrquant:
        data["quant_method"] = OWN_METHOD
        data["added_biases"] = list(result.added_biases)
        if has_exposed(model):
            data["exposed_linears"] = True
    if result.rotated.online:
        mixtures = _mixtures(model, result.block_paths)
        targets = dict.fromkeys(_any_block(name, mixtures) for name in result.rotated.online)
        width = quantized[result.rotated.online[0]].in_features
        data["transform_config"] = transform_config(list(targets), width).model_dump(mode="json")
    return data


def _groups_by_linear(model: nn.Module, result: Reconstruction, scheme: Scheme) -> dict[str, QuantizationScheme]:
    """One group for each format, layout and width of a flat input; its targets are linears by name."""
    groups: dict[tuple[Any, ...], QuantizationScheme] = {}
    linears = [
        (name, module, name in result.flat_inputs, needs_whole_weights(model, path))
        for path in result.block_paths
        for name, module in _quantized_in(model, path, scheme).items()
    ]
    for name in result.outside.weights:
        module: Any = model.get_submodule(name)
        linears.append((name, module, name in result.outside.flat, needs_whole_weights(model, "")))
    for name, module, flat, whole in linears:
        own = scheme.of(name)
        found = own.for_linear(module.in_features, flat)
        found.format = storage_format(own, whole).value
        if found.weights is not None and pads_zero_points(own, whole):
            found.weights = found.weights.model_copy(update={"zp_dtype": torch.int32})
        bits = 0 if own.weights is None else own.weights.num_bits
        key = (bits, found.format, module.in_features if flat and own.inputs is not None else 0, str(found))
        groups.setdefault(key, found).targets.append(rf"re:.*{re.escape(name)}$")
    return {f"group_{number}": groups[key] for number, key in enumerate(sorted(groups))}


def _quantized_in(model: nn.Module, path: str, scheme: Scheme) -> dict[str, nn.Linear]:
    """The quantized linears of the block at `path`, by their full names."""
    return scheme.chosen({f"{path}.{name}": linear for name, linear in linears_of(model.get_submodule(path)).items()})


def _quantized_linears(model: nn.Module, result: Reconstruction, scheme: Scheme) -> dict[str, nn.Linear]:
    """The same of all blocks."""
    return {name: linear for path in result.block_paths for name, linear in _quantized_in(model, path, scheme).items()}


def _groups(model: nn.Module, result: Reconstruction, scheme: Scheme) -> dict[str, QuantizationScheme]:
    linears = _quantized_linears(model, result, scheme)
    linears |= {name: model.get_submodule(name) for name in result.outside.flat}  # type: ignore[misc]
    ordinary = scheme.for_linear(0, flat_input=False)
    ordinary.targets = ["Linear"]
    groups = {"group_0": ordinary}
    mixtures = _mixtures(model, result.block_paths)
    flat_inputs = {_any_block(name, mixtures): name for name in sorted(result.flat_inputs) if name in linears}
    flat_inputs |= {rf"re:.*{re.escape(name)}$": name for name in sorted(result.outside.flat)}
    by_width: dict[int, QuantizationScheme] = {}
    for pattern, name in flat_inputs.items() if scheme.inputs else ():
        width = linears[name].in_features
        by_width.setdefault(width, scheme.for_linear(width, flat_input=True)).targets.append(pattern)
    groups |= {f"group_{number}": flat for number, flat in enumerate(by_width.values(), len(groups))}
    for group in groups.values():
        group.format = storage_format(scheme).value  # left out, integers with activations would be a byte each
        if group.weights is not None and pads_zero_points(scheme):
            group.weights = group.weights.model_copy(update={"zp_dtype": torch.int32})
    whole = _whole_weights(model, result)
    if whole and storage_format(scheme, whole=True) is not storage_format(scheme):
        group = scheme.for_linear(0, flat_input=False)
        group.targets, group.format = whole, storage_format(scheme, whole=True).value
        groups[f"group_{len(groups)}"] = group
    return groups


def _whole_weights(model: nn.Module, result: Reconstruction) -> list[str]:
    """Patterns of the linears whose weights stay whole in the file."""
    lists = {path.rpartition(".")[0] for path in result.block_paths if needs_whole_weights(model, path)}
    patterns = [rf"re:.*{re.escape(blocks)}\.\d+\..*" for blocks in sorted(lists)]
    return patterns + (sorted(result.outside.weights) if needs_whole_weights(model, "") else [])


def _mixtures(model: nn.Module, block_paths: Sequence[str]) -> dict[str, list[str]]:
    """The paths, within each block, of modules whose children are experts."""
    return {path: [mixture.path for mixture in mixtures_of(model.get_submodule(path))] for path in block_paths}


def _any_block(linear: str, mixtures: Mapping[str, Sequence[str]]) -> str:
    """A pattern for `linear` in whichever block of its list, and in whichever expert of its mixture."""
    path = next(path for path in mixtures if linear.startswith(f"{path}."))
    blocks, within = path.rpartition(".")[0], re.escape(linear.removeprefix(f"{path}."))
    for experts in mixtures[path]:
        within = re.sub(rf"^({re.escape(re.escape(experts))})\\\.\d+", r"\1\\.\\d+", within)
    return rf"re:.*{re.escape(blocks)}\.\d+\.{within}$"


def unpack_block(
    tensors: Mapping[str, Tensor], scheme: Scheme, storage_dtype: torch.dtype, dtype: torch.dtype, whole: bool = False
) -> dict[str, Tensor]:
    """The dequantized parameters of a packed block in `dtype`: `FrozenBlock.parameters` of what was packed."""
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(STATIC_SCALES)}
    if scheme.weights is None:
        return {name: tensor.to(dtype) for name, tensor in tensors.items()}
    products = product_dtype(scheme, storage_dtype)
    linears = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    result = {}
    for linear in linears:
        own = scheme.of(linear)
        packer = BaseCompressor.get_value_from_registry(storage_format(own, whole).value)
        quantization = QuantizationScheme(targets=[], weights=own.weights)
        prefix = f"{linear}.weight"
        local = {
            f"weight{name.removeprefix(prefix)}": part for name, part in tensors.items() if name.startswith(prefix)
        }
        if own.weights is not None and format_of(own.weights).scales.unpacked is None:
            local["weight_scale"] = local["weight_scale"].to(products)
        result[prefix] = packer.decompress(local, quantization)["weight"].to(dtype)
    inside = tuple(f"{linear}.weight" for linear in linears)
    return result | {name: tensor.to(dtype) for name, tensor in tensors.items() if not name.startswith(inside)}


# What a checkpoint holds of a quantized weight, whichever its format.
WEIGHT_PARTS = ("", "_packed", "_scale", "_zero_point", "_global_scale")


def quantized_size(weights: Mapping[str, QuantizedWeight], tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """(how many quantized weights, the bits that they take in `tensors`, scales and zero points included)."""
    bits = 0
    for linear in weights:
        parts = (tensors.get(f"{linear}.weight{part}") for part in WEIGHT_PARTS)
        bits += 8 * sum(part.nbytes for part in parts if part is not None)
    return sum(weight.codes.numel() for weight in weights.values()), bits


def buffers_of(block: nn.Module, storage_dtype: torch.dtype) -> dict[str, Tensor]:
    """What a checkpoint holds of a block besides its parameters."""
    parameters = {name for name, _ in block.named_parameters()}
    return {
        name: _stored(tensor, storage_dtype) for name, tensor in block.state_dict().items() if name not in parameters
    }


def block_tensors(
    model: nn.Module, result: Reconstruction, scheme: Scheme, storage_dtype: torch.dtype
) -> Iterator[dict[str, Tensor]]:
    """Every block's tensors under their full names, of a result that lies in memory."""
    for path, frozen in zip(result.block_paths, result.frozen, strict=True):
        packed = pack_block(frozen, scheme.within(path), storage_dtype, needs_whole_weights(model, path))
        packed = buffers_of(model.get_submodule(path), storage_dtype) | packed
        yield {f"{path}.{name}": tensor for name, tensor in packed.items()}


def rounded_outside(
    model: nn.Module, result: Reconstruction, scheme: Scheme, storage_dtype: torch.dtype
) -> dict[str, Tensor]:
    """The packed tensors of what was rounded outside the blocks."""
    outside = FrozenBlock(result.outside.weights, {})
    return pack_block(outside, scheme, storage_dtype, needs_whole_weights(model, ""))


def outside_tensors(
    model: nn.Module,
    result: Reconstruction,
    scheme: Scheme,
    storage_dtype: torch.dtype,
    read: Callable[[str], Tensor] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """The tensors outside the blocks, in `storage_dtype` where they were not rounded.

    They come in one piece; with `read`, which gives those that are not in memory, one at a time.
    """
    inside = tuple(f"{path}." for path in result.block_paths)
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    rounded = {f"{name}.weight" for name in result.outside.weights if scheme.weights is not None}
    dense = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(inside) and name not in tied and name not in rounded
    }
    packed = rounded_outside(model, result, scheme, storage_dtype)
    if read is None:
        yield {name: _stored(tensor, storage_dtype) for name, tensor in dense.items()} | packed
        return
    yield packed
    for name, tensor in dense.items():
        yield {name: _stored(read(name) if tensor.is_meta else tensor, storage_dtype)}


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
