"""How transformations act on a block: each records its edits, and one pure function applies them all.

Every transformation here scales and shifts channels. On a linear y = W x + b whose input becomes
x' = (x − δ)/S and whose output is wanted as y' = (y − ε)/T, that is

    W' = diag(1/T) · W · diag(S)        b' = (b + W δ − ε)/T

and on a norm whose output is to be x', weight' = (weight + o)/S − o and bias' = (bias − δ)/S, where o is 1 in families
that multiply by (1 + weight) and 0 elsewhere. Transformed weights are not computed here: quantization applies the
factors when it reads the weight (`fake_quantize_weight`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from lrquant.transforms.statistics import ChannelStatistics

Parameters = Mapping[str, Tensor]


SCALE, SHIFT = "scale", "shift"  # a transformation's learnables are called `name.scale`, `name.shift`


@dataclass
class Edits:
    """The changes of a block's parameters that learnables make, by module name; `parameters` by parameter name.

    Several factors of one module are multiplied. They act on a linear in this order: `weight` replaces the weight, then
    the factors on rows and columns, then quantization with clips and offsets, then `gain` and `multiplier`.
    """

    row: dict[str, Tensor] = field(default_factory=dict)  # (out,), factor on rows
    column: dict[str, Tensor] = field(default_factory=dict)  # (in,), factor on columns
    input_shift: dict[str, Tensor] = field(default_factory=dict)  # (in,), δ
    output_shift: dict[str, Tensor] = field(default_factory=dict)  # (out,), ε
    norm: dict[str, tuple[Tensor, Tensor | None, float]] = field(default_factory=dict)  # S, δ, o
    weight: dict[str, Tensor] = field(default_factory=dict)  # (out, in), e.g. the weight times a matrix
    clip_low: dict[str, Tensor] = field(default_factory=dict)  # (out, groups, 1), factor on a group's minimum
    clip_high: dict[str, Tensor] = field(default_factory=dict)  # same, on its maximum
    offset: dict[str, Tensor] = field(default_factory=dict)  # (out, in), added on the grid before rounding
    gain: dict[str, Tensor] = field(default_factory=dict)  # (out, groups or 1, 1), factor that folds into the scales
    multiplier: dict[str, Tensor] = field(default_factory=dict)  # (out, in), factor that no scale holds: dense export
    parameters: dict[str, Tensor] = field(default_factory=dict)  # any other parameter's new values

    def scale_rows(self, linear: str, factor: Tensor) -> None:
        self.row[linear] = self.row[linear] * factor if linear in self.row else factor

    def scale_columns(self, linear: str, factor: Tensor) -> None:
        self.column[linear] = self.column[linear] * factor if linear in self.column else factor


class Equivalence(Protocol):
    """One transformation of a block, declared by its family, with a scale and perhaps a shift to learn."""

    @property
    def name(self) -> str: ...

    @property
    def linears(self) -> tuple[str, ...]:
        """Linears whose weights it scales."""
        ...

    @property
    def bias_slots(self) -> tuple[str, ...]:
        """Modules that need a bias for the shift; empty when the transformation has none."""
        ...

    def initial(
        self, params: Parameters, statistics: Mapping[str, ChannelStatistics], init: str, alpha: float
    ) -> dict[str, Tensor]:
        """Where the learnables start: `scale`, and `shift` where there are bias slots for it."""
        ...

    def record(self, params: Parameters, scale: Tensor, shift: Tensor | None, edits: Edits) -> None: ...


@dataclass(frozen=True)
class Reparameterized:
    """A block's new parameters: factors on its linears' weights, and new values of its vectors."""

    row: Mapping[str, Tensor]
    column: Mapping[str, Tensor]
    vectors: Mapping[str, Tensor]  # full parameter name → new norm weight, norm bias or linear bias
    weight: Mapping[str, Tensor] = field(default_factory=dict)  # (out, in), in place of a linear's own

    @property
    def linears(self) -> tuple[str, ...]:
        """Those whose weights change."""
        return tuple(dict.fromkeys([*self.weight, *self.row, *self.column]))

    def written(self, params: Parameters, linear: str) -> Tensor:
        """The transformed weight of `linear`, (out, in), written out."""
        weight = self.weight.get(linear, params[f"{linear}.weight"])
        if linear in self.row:
            weight = weight * self.row[linear][:, None]
        return weight * self.column[linear] if linear in self.column else weight


def record_scales(
    params: Parameters, equivalences: Sequence[Equivalence], learnables: Mapping[str, Tensor], edits: Edits
) -> None:
    """Record in `edits` the effect of `equivalences` with their scales and shifts in `learnables`.

    A scale that is absent leaves its transformation out; an absent shift is zero.
    """
    for equivalence in equivalences:
        scale = learnables.get(f"{equivalence.name}.{SCALE}")
        if scale is not None:
            equivalence.record(params, scale, learnables.get(f"{equivalence.name}.{SHIFT}"), edits)


def reparameterize(
    params: Parameters, equivalences: Sequence[Equivalence], learnables: Mapping[str, Tensor]
) -> Reparameterized:
    """Apply `equivalences` with the given `learnables` to a block's `params`. Pure and differentiable."""
    edits = Edits()
    record_scales(params, equivalences, learnables, edits)
    return applied(params, edits)


def applied(params: Parameters, edits: Edits) -> Reparameterized:
    """Apply `edits` to a block's `params`, before rounding. Pure and differentiable."""
    vectors: dict[str, Tensor] = {}
    for norm, (scale, shift, offset) in edits.norm.items():
        weight = params[f"{norm}.weight"]
        vectors[f"{norm}.weight"] = (weight + offset) / scale - offset
        bias = params.get(f"{norm}.bias")
        if bias is not None:
            vectors[f"{norm}.bias"] = (bias if shift is None else bias - shift) / scale
    # In a fixed order: a set's changes from process to process, and with it the order in which gradients are added up.
    for linear in dict.fromkeys([*edits.row, *edits.input_shift, *edits.output_shift]):
        bias = params.get(f"{linear}.bias")
        if bias is None:
            continue
        if linear in edits.input_shift:
            bias = bias + params[f"{linear}.weight"] @ edits.input_shift[linear]
        if linear in edits.output_shift:
            bias = bias - edits.output_shift[linear]
        vectors[f"{linear}.bias"] = bias * edits.row[linear] if linear in edits.row else bias
    return Reparameterized(edits.row, edits.column, vectors | edits.parameters, edits.weight)


def materialize(params: Parameters, changed: Reparameterized) -> dict[str, Tensor]:
    """`params` with every transformed weight written out, in full precision."""
    result = dict(params) | dict(changed.vectors)
    return result | {f"{linear}.weight": changed.written(params, linear) for linear in changed.linears}


def spread(size: int, index: Tensor, values: Tensor, fill: float, like: Tensor) -> Tensor:
    """A vector (size,) of `fill` with `values` at `index` (any shape that `values` broadcasts to)."""
    base = torch.full((size,), fill, dtype=like.dtype, device=like.device)
    return base.index_put((index.to(like.device).flatten(),), values.expand(index.shape).flatten())
