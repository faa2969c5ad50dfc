"""The configuration by which loaders read a compressed-tensors checkpoint; its tensors are made in packing.py."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import compressed_tensors
import torch
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus
from torch import nn

from lrquant._registration import OWN_METHOD
from lrquant.architectures.targets import has_exposed, is_linear, mixtures_of
from lrquant.export.expert_layout import stored_names
from lrquant.export.whole_weights import needs_whole_weights, quantized_in
from lrquant.formats import Scheme
from lrquant.formats.activation_quant import CACHE_SCALES
from lrquant.formats.layout import dequantized_on_load, pads_zero_points, storage_format
from lrquant.reconstruction.result import Reconstruction
from lrquant.transforms.online import transform_config

STATIC_SCALES = (".input_global_scale", ".input_scale", *CACHE_SCALES)  # found in calibration


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
        for name, module in quantized_in(model, path, scheme).items()
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


def _quantized_linears(model: nn.Module, result: Reconstruction, scheme: Scheme) -> dict[str, nn.Linear]:
    """The quantized linears of all blocks, by their full names."""
    return {name: linear for path in result.block_paths for name, linear in quantized_in(model, path, scheme).items()}


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
