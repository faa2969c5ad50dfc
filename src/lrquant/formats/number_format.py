"""The NumberFormat class: the set of numbers, scales from a group's minimum and maximum, and the groups.

With y in a group of scale s and zero point z:

    q = nearest(clamp(y/s + z, low, high))        x̂ = (q − z)·s

| part | decides | examples |
|---|---|---|
| `Elements` | range, rounding, codes in memory | Integers (integers.py), E2M1 (fp4.py), E4M3 (fp8.py) |
| `Scales` | s and z for given extremes, and how s is stored | Affine, Symmetric (qparams.py), PowersOfTwo (mx.py) |
| `group_size`, `group_rows` | the columns and rows that share a scale | a row; 16 of a row; a block of 128 × 128 |

A `NumberFormat` is these parts, and nothing else in the package asks which format it is. compressed-tensors describes
the same by `QuantizationArgs`: `weight_args` and `input_args` make them. The formats that have a name are rows of
`lrquant.formats.table`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor


class Range(NamedTuple):
    """Scale and zero point of each group, and which of their clamps are open (for the backward)."""

    scale: Tensor  # (..., groups, 1)
    zero: Tensor | None  # same shape, whole numbers; None when symmetric
    scale_open: Tensor  # bool: the scale follows the extremes; nothing replaced it
    zero_open: Tensor | None  # bool: the zero point was not clamped


class Elements(Protocol):
    """The numbers themselves, in units of their scale."""

    @property
    def kind(self) -> Literal["int", "float"]:
        """As compressed-tensors calls it."""

    @property
    def bits(self) -> int:
        """Bits of a code."""

    @property
    def low(self) -> float:
        """The least number."""

    @property
    def high(self) -> float:
        """The largest number."""

    def nearest(self, clamped: Tensor) -> Tensor:
        """The number nearest to each value, which lies within the range; of two equally near ones the even code."""

    def spacing(self, place: Tensor) -> Tensor | None:
        """What a rounding offset of one moves values at `place` by, in units of the scale; None: by one."""

    def encode(self, numbers: Tensor) -> Tensor:
        """A code for each of the numbers, in one byte each."""

    def decode(self, codes: Tensor) -> Tensor:
        """The numbers of codes, in float32."""


class Scales(Protocol):
    """The rule by which groups find their scales, and how a checkpoint stores them."""

    @property
    def symmetric(self) -> bool:
        """Whether there are no zero points."""

    @property
    def has_global(self) -> bool:
        """Whether a global scale, one for the whole tensor, stands behind those of the groups or in their place."""

    @property
    def global_name(self) -> str:
        """What a checkpoint calls it, behind `weight` or `input`."""

    @property
    def follows_steps(self) -> bool:
        """Whether stored scales are fine enough to follow small steps of learning."""

    @property
    def takes_gain(self) -> bool:
        """Whether a factor on each row's dequantized values can be folded into stored scales."""

    @property
    def unpacked(self) -> torch.dtype | None:
        """The dtype that loaders dequantize to, whatever the model's; None: the model's own."""

    def range(
        self,
        low: Tensor,  # (..., groups, 1), ≤ 0
        high: Tensor,  # (..., groups, 1), ≥ 0
        elements: Elements,
        floor: float | None,
        dtype: torch.dtype | None,
        global_scale: Tensor | None,
    ) -> Range:
        """Scales and zero points of groups with these extremes, in the extremes' precision.

        `floor` is the least scale; None replaces only a scale of zero, by compressed-tensors' rule. `dtype`: what the
        checkpoint holds of scales (None: the extremes' own). `global_scale`: (1,), where there is one.
        """

    def stored(self, scale: Tensor, dtype: torch.dtype | None, global_scale: Tensor | None) -> Tensor:
        """`scale`, which something was multiplied into, as the checkpoint can hold it."""

    def global_scale(self, most: Tensor, elements: Elements, dtype: torch.dtype | None) -> Tensor:
        """The global scale of a tensor whose largest magnitude is `most`: (1,), as a checkpoint of `dtype` holds it."""

    def on_disk(self, scale: Tensor, global_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Scales as a checkpoint of `dtype` holds them."""

    def bits(self, dtype: torch.dtype) -> int:
        """Bits that a group's scale takes in a checkpoint of `dtype`."""

    def arguments(self) -> dict[str, Any]:
        """compressed-tensors' arguments that say this rule; those of `NumberFormat` win."""

    def describes(self, args: QuantizationArgs) -> bool:
        """Whether `args` say this rule."""


@dataclass(frozen=True)
class NumberFormat:
    """`elements` with `scales` for every group of `group_rows` × `group_size` values (None: as wide as the tensor)."""

    elements: Elements
    scales: Scales
    group_size: int | None = None
    group_rows: int = 1

    @property
    def bits(self) -> int:
        return self.elements.bits

    @property
    def low(self) -> float:
        return self.elements.low

    @property
    def high(self) -> float:
        return self.elements.high

    @property
    def steps(self) -> float:
        """The width of the range."""
        return self.high - self.low

    @property
    def symmetric(self) -> bool:
        return self.scales.symmetric

    @property
    def takes_gain(self) -> bool:
        """Whether LRQuant+'s rotation vector, a factor on each row, folds into the scales."""
        return self.scales.takes_gain and self.group_rows == 1

    def range(
        self, low: Tensor, high: Tensor, floor: float | None, dtype: torch.dtype | None, global_scale: Tensor | None
    ) -> Range:
        """`Scales.range` for these elements."""
        return self.scales.range(low, high, self.elements, floor, dtype, global_scale)

    def global_scale(self, most: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
        """`Scales.global_scale` for these elements; None where there is none."""
        return self.scales.global_scale(most, self.elements, dtype) if self.scales.has_global else None

    def groups(self, width: int) -> int:
        """Groups beside one another in rows of `width`."""
        return width // (self.group_size or width)

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """(groups one below the other, groups side by side) of a weight (out, in)."""
        return -(-shape[0] // self.group_rows), self.groups(shape[1])

    def per_row(self, values: Tensor, rows: int) -> Tensor:
        """`values` (rows of groups, ...) for each of the `rows` of a weight, (rows, ...)."""
        return values if self.group_rows == 1 else values.repeat_interleave(self.group_rows, 0)[:rows]

    def weight_bits(self, shape: Sequence[int], dtype: torch.dtype, code_bits: int | None = None) -> int:
        """Bits of a weight (out, in) in a checkpoint of `dtype`: codes of `code_bits`, and scales."""
        scales = math.prod(self.scale_shape(shape))
        return math.prod(shape) * (code_bits or self.bits) + scales * self.scales.bits(dtype)

    # --- as compressed-tensors describes it ---

    def weight_args(self) -> QuantizationArgs:
        """Its description of weights in this format."""
        chosen: dict[str, Any] = {"strategy": QuantizationStrategy.CHANNEL}
        if self.group_rows > 1:
            assert self.group_size is not None
            chosen = {"strategy": QuantizationStrategy.BLOCK, "block_structure": [self.group_rows, self.group_size]}
        elif self.group_size is not None:
            chosen = {"strategy": QuantizationStrategy.GROUP, "group_size": self.group_size}
        rule = {name: value for name, value in self.scales.arguments().items() if name != "observer"}
        return self._args(chosen | rule | {"dynamic": False})

    def input_args(self) -> QuantizationArgs:
        """Its description of activations in this format: ranges found at run time, but for a global scale."""
        chosen: dict[str, Any] = {"strategy": QuantizationStrategy.TOKEN, "dynamic": True, "observer": None}
        if self.group_size is not None:
            chosen |= {"strategy": QuantizationStrategy.GROUP, "group_size": self.group_size}
        return self._args(chosen | self.scales.arguments())

    def _args(self, chosen: dict[str, Any]) -> QuantizationArgs:
        return QuantizationArgs(num_bits=self.bits, type=self.elements.kind, symmetric=self.symmetric, **chosen)


def columns_and_rows(args: QuantizationArgs) -> tuple[int | None, int]:
    """(`group_size`, `group_rows`) of what `args` describe."""
    if args.block_structure is not None:
        rows, columns = args.block_structure
        return columns, rows
    return args.group_size, 1
