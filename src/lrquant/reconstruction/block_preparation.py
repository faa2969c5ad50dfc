"""Prepare a block by its recipe before anything is learned: transformations, shifts and activation formats."""

from collections.abc import Mapping, Sequence

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import nn

from lrquant.architectures.targets import linears_of
from lrquant.errors import LrquantError, UsageError
from lrquant.formats import Scheme
from lrquant.recipe import Recipe
from lrquant.reconstruction.block_parameters import FrozenBlock
from lrquant.transforms import Equivalence, QueryKey, UpToDown, ValueToOutput
from lrquant.transforms.bias_slots import missing_biases


def enabled_equivalences(declared: Sequence[Equivalence], recipe: Recipe, path: str) -> list[Equivalence]:
    """The transformations of the block at `path` that the recipe switches on.

    One whose linears all stay in floating point would bring nothing.

    Query–key scales only matter if attention or the cache is quantized. A scale between up and down projections would
    be applied before the run-time transform, not after it.
    """
    if not recipe.let:
        return []
    enabled, scheme = [], recipe.scheme.within(path)
    for equivalence in declared:
        if all(map(scheme.leaves, equivalence.linears)):
            continue
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


def check_group_size(linears: Mapping[str, nn.Linear], scheme: Scheme) -> None:
    """Raise unless the groups of `scheme` divide the inputs of every linear that it chooses of `linears`, by full name.

    Raises:
        UsageError: it names the first that they do not divide, and sizes that divide all.
    """
    linears = scheme.chosen(linears)
    sizes = {name: scheme.of(name).group_size for name in linears}
    odd = next((name for name, size in sizes.items() if size and linears[name].in_features % size), None)
    if odd is not None:
        widths = {linear.in_features for linear in linears.values()}
        divisors = [size for size in (8, 16, 32, 64, 128, 256) if all(width % size == 0 for width in widths)]
        raise UsageError(
            f"group size {sizes[odd]} does not divide the {linears[odd].in_features} input channels of {odd}; "
            f"{'sizes that do: ' + ', '.join(map(str, divisors)) if divisors else 'leave the group size out'}; "
            f"or leave the linear in floating point: --ignore '{odd}'"
        )


def check_values(block: nn.Module, path: str) -> list[str]:
    """Raise if `block` has values that no trained block has; returns the names of its all-zero matrices.

    Raises:
        LrquantError: NaN or infinite values, or nothing but zeros in every matrix.
    """
    matrices, zero = 0, []
    for name, parameter in block.named_parameters():
        if not torch.isfinite(parameter).all():
            raise LrquantError(f"{path}.{name} holds NaN or infinite values; the checkpoint is damaged")
        if parameter.ndim > 1:
            matrices += 1
            zero += [] if parameter.any() else [f"{path}.{name}"]
    if matrices and len(zero) == matrices:
        raise LrquantError(f"{path}: every weight is zero; the checkpoint is damaged")
    return zero


def check_fits(frozen: FrozenBlock, path: str, storage_dtype: torch.dtype) -> None:
    """Raise if values of a transformed block exceed the range of the checkpoint's floating-point type."""
    for name, tensor in frozen.floating_point():
        if not torch.isfinite(tensor).all():
            kind = str(storage_dtype).removeprefix("torch.")
            raise LrquantError(
                f"{path}: {name} is too large for the checkpoint's {kind} after transformation; "
                f"save the original in bfloat16, or try --no-let"
            )


def linear_input_args(block: nn.Module, scheme: Scheme, flat: set[str]) -> dict[nn.Linear, QuantizationArgs | None]:
    """Activation format of every linear's input; none where activations are left alone.

    `scheme` calls linears by their names within `block`, as `flat` does, those that see (tokens, width).
    """
    if not scheme.all_inputs:
        return {}
    return {
        module: scheme.of(name).for_linear(module.in_features, name in flat).input_activations
        for name, module in linears_of(block).items()
    }
