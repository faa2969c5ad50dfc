"""Fake quantization against compressed-tensors bit for bit, against plain autograd, and against a pencil."""

from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as their_fake_quantize
from compressed_tensors.quantization.lifecycle.forward import quantize as their_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from lrquant import formats
from lrquant.formats import Factors, NumberFormat, format_of, kernels
from lrquant.formats.fake_quant import QuantizedWeight
from lrquant.formats.integers import integers
from lrquant.formats.qparams import WEIGHT_SCALE_FLOOR
from lrquant.formats.schemes import activation_args, per_token_for_flat_inputs, weight_args
from tests import reference

BITS = range(2, 9)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def fake_quantize_weight(
    weight: Tensor, format: NumberFormat, scale_dtype: torch.dtype | None = None, **factors: Tensor | None
) -> Tensor:
    return formats.fake_quantize_weight(weight, format, Factors(**factors), scale_dtype)


def quantize_weight(
    weight: Tensor, format: NumberFormat, scale_dtype: torch.dtype | None = None, **factors: Tensor | None
) -> QuantizedWeight:
    return formats.quantize_weight(weight, format, Factors(**factors), scale_dtype)


def fake_quantize(x: Tensor, args: QuantizationArgs) -> Tensor:
    return formats.fake_quantize(x, format_of(args))


def same_bits(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


# --- Arbitrary tensors ---

ANY_WIDTH = st.integers(1, 24)


def with_odd_rows(x: Tensor, generator: torch.Generator) -> Tensor:
    """`x` (rows, width), some of whose rows are zero, constant, of one sign, or hold an outlier."""
    for row in x:
        kind = int(torch.randint(8, (1,), generator=generator))
        if kind == 0:
            row.zero_()
        elif kind == 1:
            row.fill_(float(row[0]))
        elif kind == 2:
            row.abs_()
        elif kind == 3:
            row.abs_().neg_()
        elif kind == 4:
            row[0] *= 100
    return x


@st.composite
def matrices(draw: Any, widths: SearchStrategy[int] = ANY_WIDTH) -> Tensor:
    """(rows, width) float32 of any magnitude from 1e-6 to 1e3, outliers included."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(draw(st.integers(1, 6)), draw(widths), generator=generator)
    return with_odd_rows(x * 10.0 ** draw(st.integers(-6, 1)), generator)


@st.composite
def weights_to_quantize(draw: Any) -> tuple[QuantizationArgs, dict[str, Any]]:
    """A weight format and every argument of `quantize_weight`, each optional one there or not."""
    group = draw(st.sampled_from([None, 1, 4, 8]))
    weight = draw(matrices(st.integers(1, 4).map(lambda groups: groups * (group or 8))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    (rows, width), groups = weight.shape, weight.shape[1] // (group or weight.shape[1])

    def perhaps(shape: tuple[int, ...], low: float, high: float) -> Tensor | None:
        return low + (high - low) * torch.rand(shape, generator=generator) if draw(st.booleans()) else None

    args = weight_args(draw(st.sampled_from(BITS)), group, draw(st.booleans()))
    return args, {
        "weight": weight,
        "format": format_of(args),
        "row": perhaps((rows,), 0.3, 3),
        "column": perhaps((width,), 0.3, 3),
        "clip_low": perhaps((rows, groups, 1), 0.3, 1),
        "clip_high": perhaps((rows, groups, 1), 0.3, 1),
        "scale_dtype": draw(st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16])),
    }


def transformed(weight: Tensor, row: Tensor | None, column: Tensor | None) -> Tensor:
    weight = weight if row is None else weight * row[:, None]
    return weight if column is None else weight * column


# --- Agreement with compressed-tensors ---


@given(weights_to_quantize())
def test_integers_are_what_compressed_tensors_makes_of_scales_and_zero_points(
    case: tuple[QuantizationArgs, dict[str, Any]],
) -> None:
    args, arguments = case
    ours = quantize_weight(**arguments)
    weight = transformed(arguments["weight"], arguments["row"], arguments["column"])
    theirs = their_quantize(weight, ours.scale, ours.zero, args, dtype=torch.int8)
    same_bits(ours.codes, theirs)
    dequantized = their_fake_quantize(weight, ours.scale, ours.zero, args)
    same_bits(fake_quantize_weight(**arguments), dequantized)
    same_bits(ours.dequantized(), dequantized)


@given(weights_to_quantize())
def test_scales_and_zero_points_are_compressed_tensors_own(case: tuple[QuantizationArgs, dict[str, Any]]) -> None:
    args, arguments = case
    ours = quantize_weight(**arguments | {"scale_dtype": None})
    weight = transformed(arguments["weight"], arguments["row"], arguments["column"])
    groups = weight.unflatten(-1, (ours.scale.shape[1], -1))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    low = low if arguments["clip_low"] is None else low * arguments["clip_low"][..., 0]
    high = high if arguments["clip_high"] is None else high * arguments["clip_high"][..., 0]
    scale, zero = calculate_qparams(low, high, args)
    at_least_the_floor = (ours.scale > WEIGHT_SCALE_FLOOR) | (scale == WEIGHT_SCALE_FLOOR)
    same_bits(ours.scale[at_least_the_floor], scale[at_least_the_floor])
    assert (ours.scale >= WEIGHT_SCALE_FLOOR).all()
    if ours.zero is not None:
        same_bits(ours.zero[at_least_the_floor], zero[at_least_the_floor])


@given(weights_to_quantize(), st.sampled_from(DTYPES))
def test_a_stored_scale_loses_nothing(case: tuple[QuantizationArgs, dict[str, Any]], dtype: torch.dtype) -> None:
    scale = quantize_weight(**case[1] | {"scale_dtype": dtype}).scale
    same_bits(scale.to(dtype).float(), scale)


@given(weights_to_quantize())
def test_integers_survive_packing(case: tuple[QuantizationArgs, dict[str, Any]]) -> None:
    args, arguments = case
    stored = quantize_weight(**arguments)
    packed = pack_to_int32(stored.codes, args.num_bits)
    same_bits(unpack_from_int32(packed, args.num_bits, stored.codes.shape), stored.codes)
    if stored.zero is not None:
        zero = stored.zero.repeat(9, 1)  # compressed-tensors 0.20 cannot unpack a lone word of 4-bit integers
        packed = pack_to_int32(zero, args.num_bits, packed_dim=0)
        same_bits(unpack_from_int32(packed, args.num_bits, zero.shape, packed_dim=0), zero)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(matrices(), st.sampled_from(BITS), st.booleans())
def test_activations_are_compressed_tensors_per_token(dtype: torch.dtype, x: Tensor, bits: int, sym: bool) -> None:
    args = activation_args(bits, sym)
    tokens = x.clamp(-3e4, 3e4).to(dtype)[None].repeat(2, 1, 1)  # (batch, tokens, features); float16 ends at 65504
    tokens[1] *= 0.5
    same_bits(fake_quantize(tokens, args), dynamically(tokens, args))
    flat = per_token_for_flat_inputs(args, x.shape[1])
    same_bits(fake_quantize(tokens[0], flat), dynamically(tokens[0], flat))
    same_bits(fake_quantize(tokens[0], flat), fake_quantize(tokens, args)[0])


@given(
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=5),  # subnormal numbers among them
    st.sampled_from(BITS),
    st.booleans(),
)
def test_any_token_is_rounded_as_by_compressed_tensors(token: list[float], bits: int, symmetric: bool) -> None:
    args = activation_args(bits, symmetric)
    x = torch.tensor(token).view(1, 1, -1)
    same_bits(fake_quantize(x, args), dynamically(x, args))


def test_a_token_whose_scale_vanishes_in_float16() -> None:
    # 7e-6/255 is less than half of float16's least number, 6e-8, so the scale is replaced.
    x = torch.tensor([[[0.0, 6e-6, -1e-6]]], dtype=torch.float16)
    same_bits(fake_quantize(x, activation_args(8)), dynamically(x, activation_args(8)))


def dynamically(x: Tensor, args: QuantizationArgs) -> Tensor:
    scale, zero = compute_dynamic_scales_and_zp(x, args, nn.Module())
    return their_fake_quantize(x, scale, zero, args)


def test_attention_inputs_have_a_range_per_token_and_head() -> None:
    x = torch.randn(2, 3, 5, 8)  # (batch, heads, tokens, head_dim)
    args = activation_args(4)
    same_bits(fake_quantize(x, args)[1, 2, 3], fake_quantize(x[1, 2, 3][None], args)[0])


# --- Gradients ---


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_are_plain_autograds(
    symmetric: bool, group_size: int | None, bits: int, scale_dtype: torch.dtype, clipped: bool
) -> None:
    arguments: dict[str, Any] = differentiable_arguments(group_size, clipped)
    format = integers(bits, symmetric, group_size)
    ours = fake_quantize_weight(format=format, scale_dtype=scale_dtype, **arguments)
    theirs = reference.fake_quantize_weight(
        bits=bits, symmetric=symmetric, group_size=group_size, scale_dtype=scale_dtype, **arguments
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    names = list(arguments)
    our_gradients = torch.autograd.grad(ours, list(arguments.values()), upstream)
    their_gradients = torch.autograd.grad(theirs, list(arguments.values()), upstream)
    for name, mine, plain in zip(names, our_gradients, their_gradients, strict=True):
        assert plain.abs().max() > 0, name
        assert (mine - plain).abs().max() <= 1e-9 * plain.abs().max(), name
    if clipped:  # the weight's largest value is far outside the range, or this would test nothing
        largest = transformed(arguments["weight"], arguments["row"], arguments["column"])[0, 1].detach()
        assert largest.abs() > 1.2 * (ours[0] / arguments["gain"][0]).abs().max()


def differentiable_arguments(group_size: int | None, clipped: bool) -> dict[str, Tensor]:
    """Random float64 arguments, all wanting gradients. The first rows are special."""
    generator = torch.Generator().manual_seed(0)
    rows, width = 7, 12
    groups = width // (group_size or width)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    weight = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight[0, 1] = -6.0
    weight[1].abs_()
    weight[2].abs_().neg_()
    weight[3].zero_()
    weight[4] *= 1e-7  # the scale is at its floor
    factors = (0.4, 0.7) if clipped else (0.98, 1.0)
    arguments = {
        "weight": weight,
        "row": between(0.5, 2, rows),
        "column": between(0.5, 2, width),
        "clip_low": between(*factors, rows, groups, 1),
        "clip_high": between(*factors, rows, groups, 1),
        "gain": between(0.5, 1.5, rows, 1, 1),
        "offset": between(-0.5, 0.5, rows, width),
    }
    arguments["offset"][3] = 0  # a zero row shifted to the outside is at a kink, where gradients are a convention
    return {name: tensor.requires_grad_() for name, tensor in arguments.items()}


@pytest.mark.parametrize("name", ["weight", "row", "column", "clip_low", "clip_high", "gain", "offset"])
def test_a_gradient_does_not_depend_on_which_others_are_wanted(name: str) -> None:
    arguments = differentiable_arguments(4, clipped=True)
    format = integers(4, group_size=4)
    (among_all,) = torch.autograd.grad(fake_quantize_weight(format=format, **arguments).sum(), arguments[name])
    alone = {other: tensor.detach() for other, tensor in arguments.items()} | {name: arguments[name]}
    (by_itself,) = torch.autograd.grad(fake_quantize_weight(format=format, **alone).sum(), arguments[name])
    same_bits(by_itself, among_all)


@pytest.mark.parametrize("group_size", [None, 4])
def test_gradients_of_many_rows_are_those_of_chunks(group_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = differentiable_arguments(group_size, clipped=True)
    format = integers(4, group_size=group_size)
    inputs = list(arguments.values())
    whole = torch.autograd.grad(fake_quantize_weight(format=format, **arguments).square().sum(), inputs)
    monkeypatch.setitem(kernels._CHUNK, "eager", 24 // torch.get_num_threads())  # two rows of twelve
    cut = torch.autograd.grad(fake_quantize_weight(format=format, **arguments).square().sum(), inputs)
    for one, other in zip(cut, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_transposed_activations_are_rounded_where_they_lie() -> None:
    heads_last = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    x = heads_last.transpose(1, 2).requires_grad_()
    args = activation_args(4, symmetric=False)
    rounded = fake_quantize(x, args)
    assert rounded.stride() == x.stride()
    plain = fake_quantize(x.detach().contiguous(), args)
    same_bits(rounded, plain)
    upstream = torch.randn_like(plain)
    copy = x.detach().contiguous().requires_grad_()
    (mine,) = torch.autograd.grad(rounded, x, upstream)
    (theirs,) = torch.autograd.grad(fake_quantize(copy, args), copy, upstream)
    same_bits(mine, theirs)


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_of_activations_are_plain_autograds(symmetric: bool) -> None:
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(10, 8, dtype=torch.float64)
    ours = fake_quantize(x, activation_args(4, symmetric)).view(10, 8)
    theirs = reference.fake_quantize_weight(x.view(10, 8), 4, symmetric, None)
    (mine,) = torch.autograd.grad(ours, x, upstream)
    (plain,) = torch.autograd.grad(theirs, x, upstream)
    torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-12)


def test_nothing_but_the_inputs_and_the_extremes_is_kept_for_the_backward() -> None:
    arguments = differentiable_arguments(4, clipped=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda x: x):
        fake_quantize_weight(format=integers(4, group_size=4), **arguments)
    inputs = {tensor.data_ptr() for tensor in arguments.values()}
    assert inputs <= {tensor.data_ptr() for tensor in saved}
    rows, width = arguments["weight"].shape
    extremes = [tensor for tensor in saved if tensor.data_ptr() not in inputs]
    assert [tensor.shape for tensor in extremes] == [(rows, width // 4, 1)] * 2


# --- Golden values ---


def test_asymmetric_by_hand() -> None:
    # 2 bits: integers −2 … 1, 3 steps. Range −1 … 2, s = 3/3 = 1, z = −2 − (−1)/1 = −1.
    # x/s + z = −2, −0.7, 0, 1 → q = −2, −1, 0, 1 → (q − z)·s = −1, 0, 1, 2.
    weight = torch.tensor([[-1.0, 0.3, 1.0, 2.0]])
    stored = quantize_weight(weight, integers(2))
    assert stored.scale.tolist() == [[1.0]]
    assert stored.zero is not None
    assert stored.zero.tolist() == [[-1]]
    assert stored.codes.tolist() == [[-2, -1, 0, 1]]
    assert fake_quantize_weight(weight, integers(2)).tolist() == [[-1.0, 0.0, 1.0, 2.0]]


def test_symmetric_by_hand() -> None:
    # 3 bits: integers −4 … 3, 7 steps. max|x| = 3.5, s = 3.5·2/7 = 1, no zero point.
    # −3.5 is halfway and goes to the even −4; 3.5 is clamped to 3.
    weight = torch.tensor([[-3.5, 1.2, 3.5, 0.4]])
    stored = quantize_weight(weight, integers(3, symmetric=True))
    assert stored.zero is None
    assert stored.codes.tolist() == [[-4, 1, 3, 0]]
    assert stored.dequantized().tolist() == [[-4.0, 1.0, 3.0, 0.0]]


def test_clipping_by_hand() -> None:
    # Maximum 2 times 0.25 gives the range −1 … 0.5: s = 1.5/3 = 0.5, z = −2 − (−1)/0.5 = 0.
    # x/s = −2, 0, 2, 4 → clamped to −2, 0, 1, 1 → −1, 0, 0.5, 0.5.
    weight = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
    clipped = fake_quantize_weight(weight, integers(2), clip_high=torch.full((1, 1, 1), 0.25))
    assert clipped.tolist() == [[-1.0, 0.0, 0.5, 0.5]]


def test_groups_by_hand() -> None:
    # 2 bits symmetric: s = max|x|·2/3, so 1 for the group (1.5, −1) and 2 for (3, 2).
    # 1.5 clamps to 1; −1 stays; 3/2 = 1.5 clamps to 1; 2/2 = 1.
    weight = torch.tensor([[1.5, -1.0, 3.0, 2.0]])
    stored = quantize_weight(weight, integers(2, symmetric=True, group_size=2))
    assert stored.scale.tolist() == [[1.0, 2.0]]
    assert stored.dequantized().tolist() == [[1.0, -1.0, 2.0, 2.0]]


def test_rounding_offset_by_hand() -> None:
    # As in the asymmetric case 0.3 stands at −0.7 on the grid, and rounds to −1; 0.4 more and it rounds to 0.
    weight, offset = torch.tensor([[-1.0, 0.3, 1.0, 2.0]]), torch.tensor([[0.0, 0.4, 0.0, 0.0]])
    assert fake_quantize_weight(weight, integers(2), offset=offset).tolist() == [[-1.0, 1.0, 1.0, 2.0]]
    assert quantize_weight(weight, integers(2), offset=offset).codes.tolist() == [[-2, 0, 0, 1]]


def test_a_scale_has_a_floor() -> None:
    # A range of 3e-6 in 3 steps would have s = 1e-6; with s = 1e-5 everything is less than half a step.
    stored = quantize_weight(torch.tensor([[0.0, 3e-6]]), integers(2))
    assert stored.scale.item() == pytest.approx(1e-5)
    assert stored.dequantized().tolist() == [[0.0, 0.0]]


# --- Properties ---


@given(matrices(), st.sampled_from(BITS), st.booleans())
def test_error_is_at_most_half_a_step_and_zero_stays_zero(x: Tensor, bits: int, symmetric: bool) -> None:
    x[:, -1] = 0.0
    format = integers(bits, symmetric)
    rounded, scale = fake_quantize_weight(x, format), quantize_weight(x, format).scale
    # Unclipped, even the extremes are within half a step of the grid's ends. 1e-5: float32, up to 255 steps.
    assert ((rounded - x).abs() <= scale * (0.5 + 255 * 1e-6)).all()
    assert (rounded[:, -1] == 0).all()


@given(weights_to_quantize())
def test_what_is_on_the_grid_stays(case: tuple[QuantizationArgs, dict[str, Any]]) -> None:
    args, arguments = case
    stored = quantize_weight(**arguments)
    on_grid = stored.dequantized()
    same_bits(their_quantize(on_grid, stored.scale, stored.zero, args, dtype=torch.int8), stored.codes)


@given(weights_to_quantize())
def test_scalings_are_folded_in_exactly(case: tuple[QuantizationArgs, dict[str, Any]]) -> None:
    arguments = case[1]
    written_out = transformed(arguments["weight"], arguments["row"], arguments["column"])
    folded = fake_quantize_weight(**arguments)
    same_bits(folded, fake_quantize_weight(**arguments | {"weight": written_out, "row": None, "column": None}))


@given(matrices(st.just(8)), st.sampled_from(BITS))
def test_a_row_knows_nothing_of_the_others(x: Tensor, bits: int) -> None:
    together = fake_quantize_weight(x, integers(bits))
    same_bits(together, torch.cat([fake_quantize_weight(row[None], integers(bits)) for row in x]))
