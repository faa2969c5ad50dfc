"""Originals that are already quantized, recognised by their configuration before any weight is read.

Floating-point formats (fp8, MXFP4, compressed-tensors' floats) are close enough to the original to start from:
transformers dequantizes them when loading, and they are quantized again. Integers with few bits are refused, because
their rounding errors would become part of the model.
"""

from collections.abc import Mapping
from typing import Any

from lrquant.errors import UsageError

_FLOATING = ("fp8", "mxfp4")  # quant_method; compressed-tensors says it for each group


def quantization_of(config: Any) -> dict[str, Any] | None:
    """The `quantization_config` of a transformers configuration, as it stands in config.json."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    return dict(found) if isinstance(found, Mapping) else dict(found.to_dict())


def dequantizing(config: Any, name: str) -> Any:
    """transformers' own configuration that dequantizes the source on load; None: it is not quantized.

    Raises:
        UsageError: it is quantized to integers, or by a method that cannot be undone.
    """
    found = quantization_of(config)
    if found is None:
        return None
    method = str(found.get("quant_method", "an unknown method")).removeprefix("QuantizationMethod.").lower()
    if not (method in _FLOATING or (method == "compressed-tensors" and _only_floats(found))):
        raise UsageError(f"{name}: already quantized ({_described(method, found)}); take the full-precision original")
    from transformers.quantizers.auto import AutoQuantizationConfig

    return AutoQuantizationConfig.from_dict(found | {"dequantize": True})


def source_note(config: Any) -> str | None:
    """The line that says what a run began from; None: the source is not quantized."""
    found = quantization_of(config)
    if found is None:
        return None
    described = _described(str(found.get("quant_method")), found)
    return f"The original is quantized ({described}): it was dequantized before the run."


def _groups(quantization: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups = (quantization.get("config_groups") or {}).values()
    return [group["weights"] for group in groups if isinstance(group, Mapping) and group.get("weights")]


def _only_floats(quantization: Mapping[str, Any]) -> bool:
    groups = _groups(quantization)
    return bool(groups) and all(weights.get("type") == "float" for weights in groups)


def _described(method: str, quantization: Mapping[str, Any]) -> str:
    kinds = {f"{weights.get('num_bits')}-bit {weights.get('type')}" for weights in _groups(quantization)}
    bits = quantization.get("bits")
    return ", ".join([method, *sorted(kinds), *([f"{bits} bits"] if bits else [])])
