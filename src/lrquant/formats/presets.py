"""Formats that have a name, since hardware or a runtime's kernels want exactly them, as fields of a recipe.

| name | weights | inputs | where it runs at full speed |
|---|---|---|---|
| nvfp4, nvfp4a16 | E2M1 in groups of 16 | the same, or 16 bits | NVIDIA Blackwell; weights alone: vLLM's Marlin |
| mxfp4, mxfp4a16 | E2M1 in groups of 32 | the same, or 16 bits | OCP MX hardware; weights alone: vLLM's Marlin |
| w4a16-g128 | 4-bit integers, symmetric, groups of 128 | 16 bits | vLLM's Marlin and Machete kernels |
| w8a8 | 8-bit integers, symmetric, per channel | 8-bit integers, symmetric | vLLM's int8 kernels |
| w4a8 | 4-bit integers, symmetric, per channel | 8-bit integers, symmetric | vLLM's CPU kernels on Arm |
"""

from typing import Any

_INTEGERS: dict[str, Any] = {"symmetric": True, "quantize_attention": False}
_BOTH: dict[str, Any] = _INTEGERS | {"activations_symmetric": True}

FORMATS: dict[str, dict[str, Any]] = {
    "nvfp4": {"numbers": "nvfp4", "wbits": 4, "abits": 4},
    "nvfp4a16": {"numbers": "nvfp4", "wbits": 4, "abits": 16},
    "mxfp4": {"numbers": "mxfp4", "wbits": 4, "abits": 4},
    "mxfp4a16": {"numbers": "mxfp4", "wbits": 4, "abits": 16},
    "w4a16-g128": _INTEGERS | {"wbits": 4, "abits": 16, "group_size": 128},
    "w8a8": _BOTH | {"wbits": 8, "abits": 8},
    "w4a8": _BOTH | {"wbits": 4, "abits": 8},
}
