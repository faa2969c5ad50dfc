"""What of the machine a run uses: the precision of its matrix products, and the kernels of fake quantization.

`auto` looks at the machine and at the work ahead; what it chose is written into the recipe, so that a saved
recipe names what was done.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from lrquant.errors import UsageError
from lrquant.formats.kernels import COMPILES_EXACTLY
from lrquant.recipe import Recipe

# Values gone through in a run from which compiling (half a minute, once) is sooner done than doing without.
WORTH_COMPILING = 1.5e9
ACTIVATIONS_PER_TOKEN = 8  # activations of a block per token, in multiples of the hidden size, about


def settle(recipe: Recipe, device: torch.device, blocks: Sequence[nn.Module], samples: int, tokens: int) -> Recipe:
    """`recipe` with `products` and `kernels` chosen for this machine where they are `auto`.

    `tokens` is the length of a sample. Nothing is learned without steps: then the choice is the plain one.

    Raises:
        UsageError: kernels are asked for that this PyTorch cannot compile exactly.
    """
    products, kernels = recipe.products, recipe.kernels
    if kernels == "compiled" and not COMPILES_EXACTLY:
        raise UsageError(
            f"kernels = compiled: PyTorch {torch.__version__} loses roundings when it compiles; it takes PyTorch 2.13, "
            f"or leave the kernels to lrquant"
        )
    if products == "auto":
        products = "bfloat16" if recipe.learns and has_fast_bfloat16(device) else "float32"
    if kernels == "auto":
        kernels = "eager"
        if recipe.learns and device.type == "cuda" and has_triton():
            kernels = "triton"
        elif recipe.learns and COMPILES_EXACTLY:
            worth_it = values_of_all_steps(recipe, blocks, samples, tokens) > WORTH_COMPILING
            kernels = "compiled" if worth_it else "eager"
    return recipe.changed(products=products, kernels=kernels)


def values_of_all_steps(recipe: Recipe, blocks: Sequence[nn.Module], samples: int, tokens: int) -> float:
    """Weights and activations that a run's steps go through, about."""
    weights = sum(parameter.numel() for block in blocks for parameter in block.parameters() if parameter.ndim > 1)
    steps = recipe.epochs * -(-samples // recipe.batch_size)
    width = sum(max(vector.numel() for vector in block.parameters() if vector.ndim == 1) for block in blocks)
    return float(steps * (weights + ACTIVATIONS_PER_TOKEN * width * tokens * recipe.batch_size))


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices several times faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        return capabilities.get("amx_bf16", False)
    return False


def has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def matrix_products(recipe: Recipe, device: torch.device) -> AbstractContextManager[object]:
    """Within, matrix products run in the recipe's precision, with sums in float32."""
    if recipe.products == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()
