"""What stays fixed of a block while it is learned: its own parameters, its transformations, its number format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lrquant.architectures.targets import linears_of
from lrquant.formats import NumberFormat, Scheme, format_of
from lrquant.formats.layout import product_dtype
from lrquant.transforms import Equivalence


@dataclass(frozen=True)
class BlockParameters:
    """What stays fixed while a block is learned."""

    tensors: Mapping[str, Tensor]  # the block's own parameters by name, float32
    linears: tuple[str, ...]  # that are quantized
    equivalences: Sequence[Equivalence]
    format: NumberFormat | None  # of weights; None: they stay in floating point
    storage_dtype: torch.dtype  # of scales, norms and biases in the checkpoint
    product_dtype: torch.dtype  # in which loaders dequantize (formats.layout)
    together: Mapping[str, str] = field(default_factory=dict)  # linear → the first of those that share its input
    formats: Mapping[str, NumberFormat] = field(default_factory=dict)  # of linears with other ones than `format`

    def format_of(self, linear: str) -> NumberFormat:
        """The format of a linear's weights, where there is one."""
        assert self.format is not None
        return self.formats.get(linear, self.format)

    def weight(self, linear: str) -> Tensor:
        """A linear's own weight, (out, in), float32."""
        return self.tensors[f"{linear}.weight"]

    def has_bias(self, linear: str) -> bool:
        return f"{linear}.bias" in self.tensors

    @classmethod
    def of(
        cls, block: nn.Module, equivalences: Sequence[Equivalence], scheme: Scheme, storage_dtype: torch.dtype
    ) -> "BlockParameters":
        """`scheme` calls linears by their names within `block`."""
        tensors = {name: parameter.detach().float() for name, parameter in block.named_parameters()}
        format = format_of(scheme.weights) if scheme.weights else None
        linears = tuple(scheme.chosen(linears_of(block)))
        own = {linear: scheme.of(linear).weights for linear in linears if scheme.mixed}
        formats = {linear: format_of(args) for linear, args in own.items() if args not in (None, scheme.weights)}
        products = product_dtype(scheme, storage_dtype)
        return cls(tensors, linears, equivalences, format, storage_dtype, products, formats=formats)
