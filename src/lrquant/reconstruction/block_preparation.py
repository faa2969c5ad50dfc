"""What a recipe makes of a block before anything is learned: its transformations, shifts and activation formats."""

from collections.abc import Sequence

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import nn

from lrquant.errors import LrquantError, UsageError
from lrquant.recipe import Recipe
from lrquant.reconstruction.block_parameters import FrozenBlock
from lrquant.transforms import Equivalence, QueryKey, UpToDown, ValueToOutput
from lrquant.transforms.bias_slots import missing_biases


def enabled_equivalences(declared: Sequence[Equivalence], recipe: Recipe) -> list[Equivalence]:
    """The family's transformations that the recipe switches on.

    Query–key scales only matter to rounded attention and to a rounded cache. A scale between up and down
    projections would stand before the transform at run time, not behind it.
    """
    if not recipe.let:
        return []
    enabled = []
    for equivalence in declared:
        if isinstance(equivalence, ValueToOutput) and not recipe.smooth_attention:
            continue
        if isinstance(equivalence, QueryKey) and not (recipe.smooth_attention and recipe.scheme.attention_inputs):
            continue
        if isinstance(equivalence, UpToDown) and (not recipe.smooth_mlp or "down" in recipe.rotate):
            continue
        enabled.append(equivalence)
    return enabled


def choose_shifts(
    block: nn.Module, equivalences: Sequence[Equivalence], shift: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(transformations that learn a shift, modules that need a bias added for it).

    `auto` shifts where every bias is there; `on` everywhere, and the missing biases are added.
    """
    if shift == "off":
        return (), ()
    shifted, slots = [], []
    for equivalence in equivalences:
        missing = missing_biases(block, equivalence.bias_slots)
        if equivalence.bias_slots and (shift == "on" or not missing):
            shifted.append(equivalence.name)
            slots += [name for name in missing if name not in slots]
    return tuple(shifted), tuple(slots)


def check_group_size(block: nn.Module, group_size: int | None) -> None:
    for name, module in block.named_modules():
        if group_size and isinstance(module, nn.Linear) and module.in_features % group_size:
            widths = [part.in_features for part in block.modules() if isinstance(part, nn.Linear)]
            divisors = [size for size in (32, 64, 128, 256) if all(width % size == 0 for width in widths)]
            raise UsageError(
                f"group size {group_size} does not divide the {module.in_features} input channels of {name}; "
                f"{'sizes that do: ' + ', '.join(map(str, divisors)) if divisors else 'leave it out'}"
            )


def check_finite(block: nn.Module, path: str) -> None:
    for name, parameter in block.named_parameters():
        if not torch.isfinite(parameter).all():
            raise LrquantError(f"{path}.{name} holds NaN or infinite values; the checkpoint is damaged")


def check_fits(frozen: FrozenBlock, path: str, storage_dtype: torch.dtype) -> None:
    """Raise where the checkpoint's floating-point type is too narrow for what transformations have made of a block."""
    for name, tensor in frozen.floating_point():
        if not torch.isfinite(tensor).all():
            kind = str(storage_dtype).removeprefix("torch.")
            raise LrquantError(
                f"{path}: {name} is too large for the checkpoint's {kind} once it is transformed; "
                f"save the original in bfloat16, or try --no-let"
            )


def linear_input_args(block: nn.Module, recipe: Recipe, flat: set[str]) -> dict[nn.Linear, QuantizationArgs | None]:
    """Activation format of every linear's input; none where activations are left alone."""
    return {
        module: recipe.scheme.for_linear(module.in_features, name in flat).input_activations
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and recipe.scheme.inputs is not None
    }
