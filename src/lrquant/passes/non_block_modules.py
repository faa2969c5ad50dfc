"""Modules outside the blocks: they are rounded to nearest if the recipe names them, otherwise left alone.

| chosen | modules |
|---|---|
| head | the classifier's linears, or the language head where it is not tied to the embeddings |
| projector | linears between the towers of a multimodal model |
| patch_embedding | the convolution that turns patches into tokens; kept dense in checkpoints, which pack linears only |
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lrquant.architectures.targets import is_linear, watched_inputs
from lrquant.errors import UsageError
from lrquant.formats import format_of, quantize_weight
from lrquant.formats.fake_quant import largest_weight
from lrquant.formats.fake_quant_math import Factors
from lrquant.formats.layout import product_dtype
from lrquant.loading.original import Original
from lrquant.passes.definition import Pass
from lrquant.recipe import Recipe
from lrquant.reconstruction.block_preparation import check_group_size
from lrquant.reconstruction.result import NonBlockModules
from lrquant.reconstruction.run import Run

HEADS = ("classifier", "cls_classifier", "distillation_classifier", "lm_head")
PROJECTORS = ("multi_modal_projector", "connector", "merger")


def chosen_modules(model: Any, recipe: Recipe) -> dict[str, nn.Module]:
    """Modules that the recipe's `extra` names and that it does not ignore, by their full names.

    Raises:
        UsageError: the model has no such part, or its head is tied to the embedding.
    """
    chosen: dict[str, nn.Module] = {}
    for part in recipe.extra:
        found = {name: module for name, module in model.named_modules() if _is_part(name, module, part)}
        if not found:
            raise UsageError(f"extra {part!r}: this model does not have one")
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        shared = next((name for name in found if f"{name}.weight" in tied), None)
        if shared:
            raise UsageError(f"extra {part!r}: {shared} is tied to the embedding, which is not quantized")
        chosen |= found
    return recipe.scheme.chosen(chosen)


def _is_part(name: str, module: nn.Module, part: str) -> bool:
    if part == "patch_embedding":
        return isinstance(module, nn.Conv2d | nn.Conv3d)
    if not is_linear(module):
        return False
    parts = name.split(".")
    return parts[-1] in HEADS if part == "head" else not set(PROJECTORS).isdisjoint(parts)


@torch.no_grad()
def round_modules(original: Original, recipe: Recipe, sample: dict[str, Any]) -> NonBlockModules:
    """Round the recipe's chosen parts of the model in place; `sample` shows the shape of their inputs."""
    model, storage_dtype = original.model, original.storage_dtype
    modules = chosen_modules(model, recipe)
    flat = _flat_inputs(model, modules, sample) if recipe.scheme.all_inputs else frozenset()
    weights = {}
    for name, module in modules.items():
        args = recipe.scheme.of(name).weights
        assert args is not None
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        format = format_of(args)
        rows = weight.detach().float().flatten(1)  # (out, in · kernel)
        if not is_linear(module):
            format = replace(format, group_size=None, group_rows=1)  # patches have few channels: a scale for each row
        global_scale = format.global_scale(largest_weight(rows, Factors()), storage_dtype)
        rounded = quantize_weight(rows, format, scale_dtype=storage_dtype, global_scale=global_scale)
        weight.copy_(rounded.dequantized(product_dtype(recipe.scheme, storage_dtype)).view_as(weight))
        if is_linear(module):
            weights[name] = rounded
    return NonBlockModules(weights, flat)


def _flat_inputs(model: Any, modules: dict[str, nn.Module], sample: dict[str, Any]) -> frozenset[str]:
    flat = set()

    def seen(name: str, x: torch.Tensor) -> None:
        if x.ndim != 3:
            flat.add(name)

    with watched_inputs({name: module for name, module in modules.items() if is_linear(module)}, seen):
        model(**sample)
    return frozenset(flat)


def check_modules(original: Original, recipe: Recipe) -> None:
    """Raise where the model lacks a chosen part, or the format's groups do not divide it.

    Raises:
        UsageError: it names the part.
    """
    for name, module in chosen_modules(original.model, recipe).items():
        if isinstance(module, nn.Linear):
            check_group_size({name: module}, recipe.scheme)


def _carry_out(run: Run) -> None:
    if run.recipe.scheme.weights is not None:
        run.result.outside = round_modules(run.original, run.recipe, run.samples[0])


NON_BLOCK_MODULES = Pass(
    "non-block modules",
    _carry_out,
    applies=lambda recipe: bool(recipe.extra),
    check=check_modules,
    needs_model=True,
)
