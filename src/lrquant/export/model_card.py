"""The model card written beside a checkpoint, with the metadata block that the hub reads."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from lrquant.export.sizes import Sizes
from lrquant.recipe import Recipe
from lrquant.reconstruction.coverage import Coverage
from lrquant.reconstruction.result import Reconstruction
from lrquant.runtimes import RUNTIMES, commands, format_of_config

_CARD = """---
{metadata}---

# {base} in {format}

Quantized after training by [lrquant](https://pypi.org/project/lrquant/), method `{method}`, from `{base}`.

| | |
|---|---|
| format | {format}, {container} |
| bits per quantized weight, scales included | {bits:.2f}{spread} |
| size | {megabytes:.1f} MB, {compared} |
{coverage}| calibration | {nsamples} samples of {calibration}, seed {seed} |

## Loading

```python
{loading}
```

## Serving

{serving}

{attention}{dense}The complete recipe is in `recipe.yaml`.
"""

_TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForImageTextToText": "image-text-to-text",
}


def _on_the_hub(name: str) -> bool:
    """Whether `name` reads like USER/NAME on the hub and is no folder here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _spread(layer_bits: dict[str, int] | None) -> str:
    """How many linears have how many bits."""
    counts = Counter((layer_bits or {}).values())
    return "".join(f", {counts[bits]} linears of {bits}" for bits in sorted(counts))


def _coverage_rows(coverage: Coverage | None) -> str:
    """Which share is quantized, and what is not, as rows of the card's table."""
    if coverage is None:
        return ""
    rows = [("quantized", coverage.summary())]
    rows += [(f"in floating point: {what}", how) for what, how in coverage.rows_of_left()]
    return "".join(f"| {what} | {how.replace('|', '/').replace('*', chr(92) + '*')} |\n" for what, how in rows)


def _serving(config: dict[str, Any]) -> str:
    """A table of what each program makes of the checkpoint with this config.json."""
    stored = format_of_config(config)
    started = commands(stored, "PATH")
    lines = ["| program | | command |", "|---|---|---|"]
    for runtime in RUNTIMES:
        command = f"`{started[runtime.name]}`" if runtime.name in started else ""
        lines.append(f"| {runtime.name} ({runtime.version}) | {runtime.judge(stored)} | {command} |")
    return "\n".join(lines)


def model_card(
    base: str,
    recipe: Recipe,
    sizes: Sizes,
    *,
    config: dict[str, Any],
    result: Reconstruction,
    auto: str,
    coverage: Coverage | None = None,
) -> str:
    """Markdown with YAML metadata. `config` is config.json's contents, `auto` the Auto class that loads the model."""
    quantization = config["quantization_config"]
    packed = f"compressed-tensors {quantization['format']}"
    own = result.needs_lrquant
    loading = f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("PATH")'
    if own:
        loading = "import lrquant  # registers the model class of this checkpoint with transformers\n" + loading
    if (
        auto == "AutoModelForImageTextToText"
        and "vision" in (recipe.towers or ())
        and not quantization.get("dequantize")
    ):
        loading += "\nmodel(**inputs)  # once, before model.generate(**inputs): the first call unpacks the vision tower"
    attention = ""
    if result.attention_quantized and recipe.scheme.attention:
        attention = (
            f"Queries, keys and values were quantized to {recipe.abits} bits per token and head during "
            "calibration. The checkpoint format has no such scheme, so plain transformers leaves them in floating "
            'point (slightly better, not slower); `lrquant.load("PATH")` quantizes them too.\n\n'
        )
    dense = ""
    if recipe.dense:
        dense = (
            f"Its weights were multiplied by learned rotations of rank {recipe.rotation_rank}, which no integer format "
            "can store. They are stored dense, in floating point, as the rounded values. This checkpoint is for "
            "research and saves no space.\n\n"
        )
    metadata: dict[str, Any] = {"library_name": "transformers"}
    if _on_the_hub(base):  # the hub refuses a card whose base_model is none of its own
        metadata = {"base_model": base, "base_model_relation": "quantized"} | metadata
    if auto in _TASKS:
        metadata["pipeline_tag"] = _TASKS[auto]
    if coverage is not None:
        metadata["lrquant"] = {
            "quantized_share": round(coverage.share, 4),
            "floating_point": coverage.reasons_by_name(),
        }
    metadata |= {
        "quantized_by": "lrquant",
        "quantization": recipe.format_name,
        "tags": [
            "lrquant",
            "compressed-tensors",
            "quantized",
            recipe.format_name.split()[0].lower(),
            f"{recipe.wbits}-bit" if recipe.target_bits is None else "mixed-precision",
        ],
    }
    return _CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        base=base,
        format=recipe.format_name,
        container="lrquant's extension of compressed-tensors" if own else packed,
        method=recipe.method,
        bits=sizes.bits_per_weight,
        spread=_spread(recipe.layer_bits),
        megabytes=sizes.checkpoint_bytes / 1e6,
        compared=sizes.compared,
        coverage=_coverage_rows(coverage),
        nsamples=recipe.nsamples,
        calibration=recipe.calibration,
        seed=recipe.seed,
        loading=loading,
        serving=_serving(config),
        attention=attention,
        dense=dense,
    )
