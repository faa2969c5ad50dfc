"""Every way to run the rows' arithmetic gives the same values bit for bit, and the same gradients to rounding.

Without a GPU the Triton kernels run in Triton's interpreter (tests/conftest.py).
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from lrquant.formats import kernels
from lrquant.formats.fake_quant_math import Factors, Rounding, gradients_of_rows, quantize_rows
from lrquant.formats.integers import integers
from lrquant.formats.number_format import NumberFormat
from lrquant.formats.qparams import WEIGHT_SCALE_FLOOR

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter cuts float32 to bfloat16 instead of rounding it: there, float16 stands in.
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16

WEIGHTS = {
    "W4": Rounding(integers(4), WEIGHT_SCALE_FLOOR, HALF, torch.float32, HALF),
    "W3 symmetric": Rounding(integers(3, symmetric=True), WEIGHT_SCALE_FLOOR, torch.float16),
    "W2 g16": Rounding(integers(2, group_size=16), WEIGHT_SCALE_FLOOR, HALF, HALF, torch.float32),
    "W8 g16 symmetric": Rounding(integers(8, True, 16), WEIGHT_SCALE_FLOOR, torch.float32),
}
ALL, SOME, NONE = "every factor", "some factors", "no factor"


def tensors(rows: int, width: int, how: Rounding, which: str) -> tuple[Tensor, Factors, Tensor, tuple[bool, ...]]:
    generator = torch.Generator().manual_seed(rows + width)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return (low + (high - low) * torch.rand(*shape, generator=generator)).to(DEVICE)

    groups = width // (how.format.group_size or width)
    x = torch.randn(rows, width, generator=generator).to(DEVICE)
    x[0], x[1], x[2, 0] = 0.0, x[1].abs(), 30.0
    factors = Factors()
    if which == SOME:
        factors = Factors(None, between(0.5, 2, width), between(0.5, 1, rows, groups, 1), None)
    if which == ALL:
        clips = between(0.5, 1, rows, groups, 1), between(0.5, 1, rows, groups, 1)
        offset = between(-0.5, 0.5, rows, width)
        offset[0] = 0.0  # a zero row shifted to the outside is at a kink
        factors = Factors(between(0.5, 2, rows), between(0.5, 2, width), *clips, between(0.8, 1.2, rows, 1, 1), offset)
    wanted = (which == NONE, *(factor is not None for factor in factors))
    return x, factors, torch.randn(rows, width, generator=generator).to(DEVICE), wanted


def check(kernel: Any, gradients: Any, how: Rounding, which: str, dtype: torch.dtype = torch.float32) -> None:
    for rows, width in ((24, 48), (7, 144)):
        x, factors, upstream, wanted = tensors(rows, width, how, which)
        x = x.to(dtype)
        expected, low, high = quantize_rows(x, factors, how)
        for ours, plain in zip(kernel(x, factors, how), (expected, low, high), strict=True):
            torch.testing.assert_close(ours, plain, rtol=0, atol=0)
        upstream = upstream.to(expected.dtype)
        plain = gradients_of_rows(x, factors, low, high, upstream, how, wanted)
        found = gradients(x, factors, low, high, upstream, how, wanted)
        # Sums of some hundred values, in another order; in bfloat16 each partial sum of PyTorch's is rounded.
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2
        for name, ours, theirs in zip(plain._fields, found, plain, strict=True):
            assert (ours is None) == (theirs is None), name
            if ours is not None:
                assert ours.shape == theirs.shape, name
                assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max(), name


@pytest.mark.parametrize("which", [ALL, SOME])
@pytest.mark.parametrize("name", WEIGHTS)
def test_triton_rounds_weights_as_pytorch_does(name: str, which: str) -> None:
    triton_kernels = pytest.importorskip("lrquant.formats.triton_kernels", reason="Triton is not installed")
    check(triton_kernels.quantize_rows, triton_kernels.gradients_of_rows, WEIGHTS[name], which)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("format", [integers(4), integers(8, symmetric=True), integers(4, group_size=16)], ids=str)
def test_triton_rounds_activations_as_pytorch_does(format: NumberFormat, dtype: torch.dtype) -> None:
    triton_kernels = pytest.importorskip("lrquant.formats.triton_kernels", reason="Triton is not installed")
    check(triton_kernels.quantize_rows, triton_kernels.gradients_of_rows, Rounding(format, None), NONE, dtype)


def test_triton_adds_columns_up_over_many_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_kernels = pytest.importorskip("lrquant.formats.triton_kernels", reason="Triton is not installed")
    monkeypatch.setattr(triton_kernels, "_VALUES", 128)  # one or two rows a program
    monkeypatch.setattr(triton_kernels, "_LEAST_STRIPS", 4)  # several of them in a strip
    check(triton_kernels.quantize_rows, triton_kernels.gradients_of_rows, WEIGHTS["W4"], ALL)


COMPILED = Rounding(integers(4), WEIGHT_SCALE_FLOOR, torch.bfloat16, torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("how", "which"), [(COMPILED, SOME), (Rounding(integers(4), None), NONE)], ids=["weights", "activations"]
)
def test_compiled_rows_are_the_plain_ones(how: Rounding, which: str) -> None:
    with kernels.using("compiled"):
        check(kernels.quantize, kernels.gradients, how, which)


@pytest.mark.skipif(not kernels.COMPILES_EXACTLY, reason="this PyTorch is not asked to compile")
def test_what_cannot_be_compiled_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(function: Any, **_: Any) -> Any:
        def call(*_: Any) -> None:
            raise torch._dynamo.exc.TorchDynamoException("no C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    kernels._compiled.cache_clear()
    try:
        with kernels.using("compiled"):
            check(kernels.quantize, kernels.gradients, WEIGHTS["W4"], ALL)
    finally:
        kernels._compiled.cache_clear()
    assert "no C++ compiler" in caplog.text
