"""Resolve a recipe: everything that it leaves to the model and the machine is decided here, once.

| field | decided from |
|---|---|
| calibration, nsamples | token ids, where they are given in memory |
| seqlen | the samples of text: the recipe's, or as many tokens as the model takes, up to 2048 |
| what passes decide | the model (`Pass.resolve`): which rotations cost nothing |
| products | the device: bfloat16 where it multiplies that fast and something is learned |
| kernels | the device and the work ahead |
| threads | on a CPU, the threads that PyTorch uses |

The bits of a mixed-precision run follow from measured errors and come later, from that pass.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lrquant.calibration.capture import tokens_of
from lrquant.calibration.samples import TokenIds
from lrquant.errors import UsageError
from lrquant.formats.kernels import COMPILES_EXACTLY
from lrquant.loading.original import Original
from lrquant.passes.pipeline import resolved_by_passes
from lrquant.recipe import Recipe
from lrquant.runtime.execution import Machine, has_fast_bfloat16, has_triton

# Values gone through in a run from which compiling (half a minute, once) is sooner done than doing without.
WORTH_COMPILING = 1.5e9
ACTIVATIONS_PER_TOKEN = 8  # activations of a block per token, in multiples of the hidden size, about


def resolve(
    recipe: Recipe, original: Original, machine: Machine, *, samples: Sequence[dict[str, Any]], given: TokenIds | None
) -> Recipe:
    """Resolve `recipe` for `original`. The resolved recipe is saved beside the result and reproduces it.

    All ranks use the result of the first one. `given`: the token ids behind `samples`, if they do not come from the
    recipe's own source.

    Raises:
        UsageError: it asks for kernels that this PyTorch cannot compile exactly.
    """
    changes: dict[str, Any] = {}
    if given is not None:
        changes |= {"nsamples": len(samples), "calibration": given.name}
    elif "pixel_values" not in samples[0]:
        changes["seqlen"] = samples[0]["input_ids"].shape[-1]
    changes |= resolved_by_passes(original, recipe)
    if recipe.products == "auto":
        fast = recipe.learns and has_fast_bfloat16(machine.device)
        changes["products"] = "bfloat16" if fast else "float32"
    if machine.device.type == "cpu":
        changes["threads"] = torch.get_num_threads()
    changes["kernels"] = resolve_kernels(recipe, original, machine, samples=samples)
    resolved = recipe.changed(**changes)
    return Recipe.parse(json.loads(machine.ranks.text(json.dumps(resolved.model_dump(mode="json")))))


def resolve_kernels(recipe: Recipe, original: Original, machine: Machine, *, samples: Sequence[dict[str, Any]]) -> str:
    """The kernels of fake quantization: those of the recipe, or the fastest here.

    Raises:
        UsageError: kernels are asked for that this PyTorch cannot compile exactly.
    """
    if recipe.kernels == "compiled" and not COMPILES_EXACTLY:
        raise UsageError(
            f"kernels = compiled: PyTorch {torch.__version__} loses roundings when it compiles; install PyTorch 2.13, "
            f"or leave kernels out"
        )
    if recipe.kernels != "auto":
        return recipe.kernels
    if not recipe.learns:
        return "eager"
    if machine.device.type == "cuda" and has_triton():
        return "triton"
    if COMPILES_EXACTLY and values_of_all_steps(recipe, original, samples=samples) > WORTH_COMPILING:
        return "compiled"
    return "eager"


def values_of_all_steps(recipe: Recipe, original: Original, *, samples: Sequence[dict[str, Any]]) -> float:
    """Roughly how many weights and activations a run's steps process."""
    blocks = [block for stage in original.stages for block in stage.blocks(original.model)]
    tokens = tokens_of(original.model, original.stages[0].blocks(original.model), samples[0])
    weights = sum(parameter.numel() for block in blocks for parameter in block.parameters() if parameter.ndim > 1)
    steps = recipe.epochs * -(-len(samples) // recipe.batch_size)
    width = sum(_width(block) for block in blocks)
    return float(steps * (weights + ACTIVATIONS_PER_TOKEN * width * tokens * recipe.batch_size))


def _width(block: nn.Module) -> int:
    """The longest vector; a block without any (norms without weights, no biases) has rows of matrices."""
    parameters = list(block.parameters())
    vectors = (each.numel() for each in parameters if each.ndim == 1)
    return max(vectors, default=max((each.shape[-1] for each in parameters), default=0))
