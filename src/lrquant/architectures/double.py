"""Run model code in float64, even where it asks for a narrower type.

Norms, softmax and rotary embeddings convert to float32. Two computations that are equal in exact arithmetic then differ
by 1e-7, about as much as with a small mistake. In float64 they differ by 1e-15.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lrquant.runtime.compat import grouped_products

_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}
_GROUPED = grouped_products()
_CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}


class _InDouble(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _CASTS:
            function = Tensor.double
        elif function in _GROUPED:
            function = _grouped_product
        return function(*map(_widened, args), **{name: _widened(value) for name, value in (kwargs or {}).items()})


def _grouped_product(
    rows: Tensor, matrices: Tensor, *, offs: Tensor, bias: Any = None, out_dtype: Any = None
) -> Tensor:
    """Rows (tokens, in) that end at `offs` (experts,), by matrices (experts, in, out); PyTorch's own has no float64."""
    ends = offs.tolist()
    pieces = [rows[start:end] @ matrix for start, end, matrix in zip([0, *ends], ends, matrices, strict=False)]
    return torch.cat([*pieces, rows.new_zeros(len(rows) - ends[-1], matrices.shape[-1])])


def _widened(value: Any) -> Any:
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value


@contextmanager
def in_double() -> Iterator[None]:
    """A context in which tensors are created in float64, and casts to narrower floats give float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _InDouble():
            yield
    finally:
        torch.set_default_dtype(before)
