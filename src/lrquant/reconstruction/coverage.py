"""Which share of a model's parameters is quantized, and what stays in floating point, and why.

Everything is read from modules and shapes, so a skeleton on the meta device answers before any work is done:

    share of the blocks = quantized parameters in blocks / parameters in blocks
    missed              = matrices of blocks that are not quantized although nobody asked to leave them out

Routers, gates, norms, biases and convolutions stay in floating point by design. A matrix that stays because lrquant
does not understand it is another matter: the first line of a result names it, and where such matrices are more than
half of the blocks' parameters, nothing is begun.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lrquant.architectures.targets import experts_in
from lrquant.errors import UsageError

IGNORED = "ignored by the recipe"
EXPERTS = "experts of an unsupported kind"
LINEAR = "linear that the format cannot hold"
CONV1D = "Conv1D, which is not supported"
MATRIX = "matrix of an unknown kind"
MISSED = (EXPERTS, LINEAR, CONV1D, MATRIX)  # nobody asked to leave these out
LOUD = 0.01  # share of the blocks' parameters from which missed matrices are the first thing said


@dataclass(frozen=True)
class Left:
    """Parameters that stay in floating point for one reason."""

    reason: str
    names: tuple[str, ...]  # of modules, numbers replaced by *
    parameters: int
    in_blocks: bool


@dataclass(frozen=True)
class BlockKind:
    """Blocks of one structure."""

    name: str  # of their class
    blocks: tuple[int, ...]  # their numbers
    parameters: int
    quantized: int

    @property
    def share(self) -> float:
        return self.quantized / max(1, self.parameters)


@dataclass(frozen=True)
class Coverage:
    """What a run quantizes of a model, in parameters."""

    parameters: int
    quantized: int
    kinds: tuple[BlockKind, ...]
    left: tuple[Left, ...]  # the largest first

    @property
    def share(self) -> float:
        """Of the whole model."""
        return self.quantized / max(1, self.parameters)

    @property
    def block_share(self) -> float:
        """Of the blocks."""
        return sum(kind.quantized for kind in self.kinds) / max(1, self._in_blocks)

    @property
    def _in_blocks(self) -> int:
        return sum(kind.parameters for kind in self.kinds)

    @property
    def missed(self) -> tuple[Left, ...]:
        return tuple(left for left in self.left if left.in_blocks and left.reason in MISSED)

    @property
    def missed_share(self) -> float:
        """Of the blocks' parameters."""
        return sum(left.parameters for left in self.missed) / max(1, self._in_blocks)

    def check(self) -> None:
        """Raise where most of the blocks would stay as they are.

        Raises:
            UsageError: names what is not understood and what to do.
        """
        if self.missed_share > 0.5:
            raise UsageError(
                f"only {self.block_share:.1%} of the blocks' parameters can be quantized: {self._missed_names()}; "
                "this model is not supported"
            )

    def warning(self) -> str | None:
        """The line that comes before everything else; None: nothing was missed."""
        if self.missed_share < LOUD:
            return None
        return f"{self.missed_share:.1%} of the blocks' parameters stay in floating point: {self._missed_names()}"

    def _missed_names(self) -> str:
        """What was missed, and why."""
        return "; ".join(f"{', '.join(left.names)} ({left.reason})" for left in self.missed)

    def summary(self) -> str:
        return (
            f"{self.share:.1%} of the model's {_count(self.parameters)} parameters are quantized, "
            f"{self.block_share:.1%} of its blocks'"
        )

    def sentence(self) -> str:
        """All of it in one line."""
        left = "; ".join(f"{what} ({how})" for what, how in self.rows_of_left())
        return f"{self.summary()}. In floating point: {left}."

    def rows(self) -> list[tuple[str, str]]:
        """(what, how much of it) for people: kinds of blocks, then what stays in floating point."""
        kinds = [
            (f"{kind.name} {_ranges(kind.blocks)}", f"{kind.share:.1%} of {_count(kind.parameters)}")
            for kind in self.kinds
        ]
        return (kinds if len(kinds) > 1 else []) + self.rows_of_left()

    def rows_of_left(self) -> list[tuple[str, str]]:
        """(why, how many parameters of which modules) stay in floating point, for people."""
        return [(reason, f"{_count(count)}: {_some(names)}") for reason, (count, names) in self.reasons().items()]

    def reasons_by_name(self) -> dict[str, str]:
        """Why parameters stay in floating point → modules, for programs."""
        return {reason: ", ".join(names) for reason, (_, names) in self.reasons().items()}

    def reasons(self) -> dict[str, tuple[int, tuple[str, ...]]]:
        """Why parameters stay in floating point → (how many, modules), the most frequent reason first."""
        found: dict[str, tuple[int, tuple[str, ...]]] = {}
        for left in self.left:
            count, names = found.get(left.reason, (0, ()))
            found[left.reason] = count + left.parameters, names + left.names
        return dict(sorted(found.items(), key=lambda item: -item[1][0]))

    def as_dict(self) -> dict[str, Any]:
        return {
            "parameters": self.parameters,
            "quantized_parameters": self.quantized,
            "quantized_share": self.share,
            "quantized_share_of_blocks": self.block_share,
            "kinds": [asdict(kind) for kind in self.kinds],
            "left": [asdict(left) for left in self.left],
        }


def coverage_of(
    model: Any,
    block_paths: Sequence[str],
    quantized: Collection[str],  # parameters by full name
    *,
    ignored: Callable[[str], bool] = lambda module: False,
) -> Coverage:
    """What is quantized of `model` when the parameters `quantized` are. `ignored` knows modules the user left out."""
    kinds: dict[tuple[Any, ...], BlockKind] = {}
    left: dict[tuple[str, bool], tuple[dict[str, None], int]] = {}
    block_of = _block_of(block_paths)
    total = done = 0
    for index, path in enumerate(block_paths):
        block = model.get_submodule(path)
        named = [(name, parameter.numel()) for name, parameter in block.named_parameters()]
        size, took = sum(count for _, count in named), sum(n for name, n in named if f"{path}.{name}" in quantized)
        structure = (type(block).__name__, tuple((name, tuple(p.shape)) for name, p in block.named_parameters()))
        before = kinds.get(structure, BlockKind(type(block).__name__, (), 0, 0))
        kinds[structure] = BlockKind(
            before.name, (*before.blocks, index), before.parameters + size, before.quantized + took
        )
    tied = getattr(model, "all_tied_weights_keys", None) or {}  # a skeleton's ties are in its words alone
    for name, parameter in model.named_parameters():
        if name in tied:
            continue
        total += parameter.numel()
        if name in quantized:
            done += parameter.numel()
            continue
        module = name.rpartition(".")[0]
        inside = block_of(name)
        reason = IGNORED if ignored(module) else _reason(model, name, inside=inside)
        names, count = left.get((reason, inside), ({}, 0))
        names[re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", module or name)] = None
        left[reason, inside] = (names, count + parameter.numel())
    found = [Left(reason, tuple(names), count, inside) for (reason, inside), (names, count) in left.items()]
    return Coverage(total, done, tuple(kinds.values()), tuple(sorted(found, key=lambda each: -each.parameters)))


def _block_of(block_paths: Sequence[str]) -> Callable[[str], bool]:
    lists = {path.rpartition(".")[0] for path in block_paths}
    paths = set(block_paths)

    def inside(name: str) -> bool:
        for above in lists:
            if name.startswith(f"{above}."):
                number = name.removeprefix(f"{above}.").partition(".")[0]
                return f"{above}.{number}" in paths
        return False

    return inside


def _reason(model: Any, name: str, *, inside: bool) -> str:
    """Why a parameter is not quantized, from what its module is and what stands beside it."""
    path, _, own = name.rpartition(".")
    module, parameter = model.get_submodule(path), model.get_parameter(name)
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return "embedding"
    if not inside and module is _head(model):
        return "output head"
    if own.endswith("bias"):
        return "bias"
    if parameter.ndim < 2:
        return "norm" if "norm" in kind.lower() else "vector"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "convolution"
    if not inside:
        return "outside the quantized blocks"
    if parameter.shape[0] in (1, *_experts_beside(model, path)):
        return "router or gate"
    if parameter.ndim > 2:
        return EXPERTS
    if isinstance(module, nn.Linear):
        return LINEAR
    return CONV1D if kind == "Conv1D" else MATRIX


def _head(model: Any) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if get is not None else None


def _experts_beside(model: Any, path: str) -> Iterator[int]:
    """How many experts a module has beside it: a fused tensor's first dimension, or the length of a list."""
    above = path.rpartition(".")[0]
    for name, sibling in model.get_submodule(above).named_children():
        if f"{above}.{name}" == path:
            continue
        if found := experts_in(sibling):
            yield len(found)
        yield from (tensor.shape[0] for tensor in sibling.parameters(recurse=False) if tensor.ndim == 3)


def _count(parameters: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= size:
            return f"{parameters / size:,.2f} {unit}"
    return str(parameters)


def _ranges(numbers: Sequence[int]) -> str:
    """`0, 2–5, 7`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in parts)


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
