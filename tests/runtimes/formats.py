"""Number formats that vLLM is asked about, and the configurations that lrquant writes for them.

`python -m tests.runtimes.formats ASKED.json` writes them for scripts/vllm_verdicts.py.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from lrquant.formats.layout import pads_zero_points, storage_format
from lrquant.recipe import Recipe


def _asked() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    plain = {"quantize_attention": False}
    for symmetric in (True, False):
        kind = "symmetric" if symmetric else "asymmetric"
        for bits in range(2, 9):
            found[f"W{bits}A16 {kind}"] = {"wbits": bits, "abits": 16, "symmetric": symmetric}
        for bits, group in (
            (2, 64),
            (3, 128),
            (4, 16),
            (4, 32),
            (4, 64),
            (4, 128),
            (4, 256),
            (8, 64),
            (8, 128),
            (8, 256),
        ):
            fields = {"wbits": bits, "abits": 16, "symmetric": symmetric, "group_size": group}
            found[f"W{bits}A16 g{group} {kind}"] = fields
        for wbits, abits in ((8, 8), (4, 8), (4, 4), (6, 6), (3, 8), (8, 4), (6, 8), (2, 4), (3, 4)):
            for inputs in (True, False):
                fields = {"wbits": wbits, "abits": abits, "symmetric": symmetric, "activations_symmetric": inputs}
                name = f"W{wbits}A{abits} {kind}, {'symmetric' if inputs else 'asymmetric'} inputs"
                found[name] = plain | fields
    for wbits, abits, group in ((4, 8, 128), (4, 4, 128), (4, 4, 64), (8, 8, 128), (6, 6, 128)):
        fields = {"wbits": wbits, "abits": abits, "symmetric": True, "activations_symmetric": True, "group_size": group}
        found[f"W{wbits}A{abits} g{group} symmetric, symmetric inputs"] = plain | fields
    return found | {name: {"format": name} for name in FLOATS}


FLOATS = (
    "nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16", "fp8", "fp8a16", "fp8-static", "fp8-block", "mxfp8", "mxfp8a16",
    "w4a8-fp8",
)  # fmt: skip
ASKED = _asked()  # name → fields of a recipe


def recipe(name: str) -> Recipe:
    return Recipe.preset("rtn", **ASKED[name])


def configuration(name: str) -> dict[str, Any]:
    """`quantization_config` of a checkpoint in this format, as export/compressed_tensors.py writes it."""
    scheme = recipe(name).scheme
    group = scheme.for_linear(0, flat_input=False)
    group.targets, group.format = ["Linear"], storage_format(scheme).value
    if group.weights is not None and pads_zero_points(scheme):
        group.weights = group.weights.model_copy(update={"zp_dtype": torch.int32})
    groups = {"group_0": json.loads(group.model_dump_json())}
    status = {"quantization_status": "compressed", "ignore": []}
    return {"quant_method": "compressed-tensors", "format": group.format, "config_groups": groups} | status


if __name__ == "__main__":
    asked = {name: configuration(name) for name in ASKED}
    Path(sys.argv[1]).write_text(json.dumps(asked, indent=1, sort_keys=True) + "\n")
