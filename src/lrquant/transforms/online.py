"""A Hadamard transform at run time, before a linear: x ← x H, where no norm or linear before it can hold H.

The input of an MLP's down projection comes from a product or an activation function, so H has to be computed
for every token (QuaRot §4, "online"); the weight behind it holds H's inverse. H is block diagonal, Sylvester's
matrix over the largest power of two that divides the width: runtimes have fast kernels for those, and a width of
14336 is spread in blocks of 2048.
"""

import math
from collections.abc import Sequence

import torch
from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme
from compressed_tensors.utils import match_named_modules
from torch import Tensor, nn

from lrquant.errors import UsageError
from lrquant.transforms.hadamard import hadamard

LEAST_BLOCK = 8


def block_of(width: int) -> int:
    """The largest power of two that divides `width`.

    Raises:
        UsageError: it is too small for a Hadamard matrix to spread anything.
    """
    block = width & -width
    if block < LEAST_BLOCK:
        raise UsageError(
            f"rotate 'down': no power of two from {LEAST_BLOCK} on divides the {width} inputs of the down "
            f"projection; leave it out"
        )
    return block


class BlockHadamard:
    """H of a width. Symmetric and its own inverse: a weight W H undoes it.

    A block of b = b₁ b₂ channels is a matrix (b₁, b₂), and H = H₁ ⊗ H₂ acts on it as H₁ X H₂.
    """

    def __init__(self, width: int) -> None:
        block = block_of(width)
        first = 1 << (block.bit_length() - 1) // 2
        with torch.device("cpu"):  # transformers builds models on the meta device
            self._outer, self._inner = _sylvester(first), _sylvester(block // first)

    def __call__(self, x: Tensor) -> Tensor:
        """x H, (…, width), in the precision of x."""
        blocks = x.unflatten(-1, (-1, len(self._outer), len(self._inner)))
        return (self._outer.to(x) @ blocks @ self._inner.to(x)).flatten(-3)


def _sylvester(size: int) -> Tensor:
    matrix = hadamard(size)
    assert matrix is not None
    return matrix / math.sqrt(size)


class _Hook:
    """A forward pre-hook that transforms a linear's inputs, in float32."""

    def __init__(self, width: int) -> None:
        self._transform = BlockHadamard(width)

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        wide = torch.is_autocast_enabled(x.device.type)  # then what quantizes x wants it in float32
        with torch.autocast(x.device.type, enabled=False):
            result = self._transform(x.float())
        return (result if wide else result.to(x.dtype), *inputs[1:])


def add_online_transform(linear: nn.Linear) -> None:
    """Have every input of `linear` transformed, before anything else sees it."""
    linear.register_forward_pre_hook(_Hook(linear.in_features), prepend=True)


def transform_config(linears: Sequence[str], width: int) -> TransformConfig:
    """What a checkpoint says of it, in compressed-tensors' words: `linears` are targets."""
    inputs = TransformArgs(targets=list(linears), location="input")
    weights = TransformArgs(targets=list(linears), location="weight_input", inverse=True)
    scheme = TransformScheme(type="hadamard", head_dim=block_of(width), apply=[inputs, weights])
    return TransformConfig(config_groups={"down": scheme})


def add_online_transforms(model: nn.Module, config: TransformConfig | None) -> None:
    """Have `model` compute the transforms that `config`, one of `transform_config`'s, puts before its linears."""
    for scheme in config.config_groups.values() if config is not None else ():
        for args in scheme.apply:
            if args.is_online():
                for _, linear in match_named_modules(model, args.targets, args.ignore):
                    add_online_transform(linear)  # type: ignore[arg-type]
