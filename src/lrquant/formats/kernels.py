"""Kernels for the arithmetic of `fake_quant_math`: eager PyTorch, compiled by PyTorch, or Triton for CUDA.

    eager      chunks of rows that fit a processor's cache, one operation after another; starts at once
    compiled   `torch.compile` fuses each direction into a few loops: many times faster, after seconds of compiling;
               from PyTorch 2.13 on, before which it is eager
    triton     one kernel per direction for CUDA (lrquant.formats.triton_kernels); for integers; else compiled

All give the same x̂ bit for bit, so that learning and the checkpoint have the same integers; gradients agree up to
rounding. `using` selects kernels within a context; outside it everything is eager, which is best for a few calls.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from lrquant.formats.fake_quant_math import Factors, Gradients, Rounding, gradients_of_rows, quantize_rows
from lrquant.formats.integers import Integers
from lrquant.runtime import compat

_CHOSEN: ContextVar[str] = ContextVar("kernels", default="eager")
# Before, torch.compile passed over roundings on the way: a scale kept digits that the checkpoint does not hold.
COMPILES_EXACTLY = Version(torch.__version__).release >= (2, 13)
_CHUNK = {"eager": 1 << 16, "compiled": 1 << 20}  # elements of a call per thread of a CPU
_CHUNK_OF_ACCELERATOR = 1 << 24

_log = logging.getLogger(__name__)


@contextmanager
def using(kernels: str) -> Iterator[None]:
    """Run fake quantization with `kernels` within."""
    token = _CHOSEN.set(kernels)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def chosen() -> str:
    """The kernels that fake quantization runs with here."""
    return _CHOSEN.get()


def quantize(x: Tensor, factors: Factors, how: Rounding) -> tuple[Tensor, Tensor, Tensor]:
    """`rows.quantize_rows` by the chosen kernels."""
    if torch.compiler.is_compiling():  # into a larger graph (lrquant.reconstruction.compiled_block)
        return quantize_rows(x, factors, how)
    kernels = _chosen_for(x, how)
    if kernels == "triton":
        from lrquant.formats import triton_kernels

        return triton_kernels.quantize_rows(x, factors, how)
    function: Callable[..., Any] = quantize_rows
    if kernels == "compiled":
        factors, function = _complete(x, factors, how), _compiled(quantize_rows)
    parts = [function(x[rows], factors.of_rows(rows), how) for rows in _chunks(x, kernels)]
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))  # type: ignore[return-value]


def gradients(
    x: Tensor,
    factors: Factors,
    low: Tensor,
    high: Tensor,
    grad: Tensor,
    how: Rounding,
    wanted: Sequence[bool],
) -> Gradients:
    """`rows.gradients_of_rows` by the chosen kernels."""
    if torch.compiler.is_compiling():
        return gradients_of_rows(x, factors, low, high, grad, how, wanted)
    kernels = _chosen_for(x, how)
    if kernels == "triton":
        from lrquant.formats import triton_kernels

        return triton_kernels.gradients_of_rows(x, factors, low, high, grad, how, wanted)
    function: Callable[..., Any] = gradients_of_rows
    asked = tuple(wanted)
    if kernels == "compiled":
        complete, function = _complete(x, factors, how), _compiled(gradients_of_rows)
        if complete is not factors:  # one graph for all weights, whichever of the small gradients they want
            factors, asked = complete, (wanted[0], *[True] * 5, wanted[6])
    parts = [
        function(x[rows], factors.of_rows(rows), low[rows], high[rows], grad[rows], how, asked)
        for rows in _chunks(x, kernels)
    ]
    found = _joined(parts)
    return Gradients(*(value if wants else None for value, wants in zip(found, wanted, strict=True)))


def _chosen_for(x: Tensor, how: Rounding) -> str:
    kernels = _CHOSEN.get()
    if kernels == "triton" and not x.is_cuda:
        return "eager"
    # Triton's kernels here know integers; PyTorch compiles the arithmetic of any format.
    kernels = "compiled" if kernels == "triton" and not isinstance(how.format.elements, Integers) else kernels
    return "eager" if kernels == "compiled" and not COMPILES_EXACTLY else kernels


def _joined(parts: Sequence[Gradients]) -> Gradients:
    """Gradients of all rows from those of chunks: the column's add up, all others stand one below the other."""
    if len(parts) == 1:
        return parts[0]
    joined = {}
    for name, pieces in zip(Gradients._fields, zip(*parts, strict=True), strict=True):
        if pieces[0] is not None:
            joined[name] = torch.stack(pieces).sum(0) if name == "column" else torch.cat(pieces)
    return Gradients(**{name: joined.get(name) for name in Gradients._fields})


def _chunks(x: Tensor, kernels: str) -> list[slice]:
    limit = _CHUNK[kernels] * torch.get_num_threads() if x.device.type == "cpu" else _CHUNK_OF_ACCELERATOR
    rows, width = x.shape
    size = max(1, limit // max(1, width))
    return [slice(begin, begin + size) for begin in range(0, max(rows, 1), size)]


def _complete(x: Tensor, factors: Factors, how: Rounding) -> Factors:
    """`factors` with ones for those that a weight lacks: one graph serves all weights. Activations have none."""
    if not any(factor is not None for factor in factors):
        return factors
    rows, width = x.shape
    groups = width // (how.format.group_size or width)
    shapes = {"row": (rows,), "column": (width,), "gain": (rows, 1, 1)}
    shapes |= dict.fromkeys(("clip_low", "clip_high"), (rows, groups, 1))
    ones = {name: x.new_ones(shape) for name, shape in shapes.items() if getattr(factors, name) is None}
    return factors._replace(**ones)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled for any shapes; as it is where nothing can be compiled (no C++ compiler, say)."""
    compat.allow_many_graphs()
    # Without emulated casts, a scale that the checkpoint rounds would keep its extra digits inside the loop.
    compiled = torch.compile(function, dynamic=True, options={"emulate_precision_casts": True})
    works = True

    def call(*arguments: Any) -> Any:
        nonlocal works
        if works:
            try:
                return compiled(*arguments)
            except compat.compile_errors() as error:
                works = False
                _log.warning("torch.compile does not work here (%s); continuing without it", str(error).splitlines()[0])
        return function(*arguments)

    return call
