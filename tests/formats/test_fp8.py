"""FP8 against compressed-tensors code by code, its blocks against plain autograd, and by hand."""

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as their_fake_quantize
from compressed_tensors.quantization.lifecycle.forward import quantize as their_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lrquant import formats
from lrquant.errors import UsageError
from lrquant.formats import Factors, Scheme, fake_quantize_weight, format_of, kernels, quantize_weight
from lrquant.formats.fp8 import E4M3, FP8, FP8_BLOCK, FP8_BLOCK_INPUTS, FP8_STATIC, MXFP8
from lrquant.formats.gptq import compensating_offsets
from lrquant.recipe import Recipe
from tests.formats.test_fake_quant import matrices, same_bits
from tests.reference import straight_through

CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
NUMBERS = CODES.float()[~CODES.float().isnan()]  # 254: two codes stand for NaN
HALVES = [torch.float32, torch.bfloat16, torch.float16]


# --- The numbers ---


def test_every_code_is_its_number_and_back() -> None:
    assert len(NUMBERS) == 254
    elements = E4M3()
    same_bits(elements.nearest(NUMBERS), NUMBERS)
    assert torch.equal(elements.encode(NUMBERS).view(torch.uint8), CODES[~CODES.float().isnan()].view(torch.uint8))
    same_bits(elements.decode(elements.encode(NUMBERS)), NUMBERS)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_number_its_neighbours_and_every_tie_are_rounded_as_by_compressed_tensors(dtype: torch.dtype) -> None:
    points = NUMBERS.double().unique()
    points = torch.cat([points, (points[1:] + points[:-1]) / 2]).to(dtype)
    far = torch.full_like(points, 1e4)
    points = torch.cat([points, torch.nextafter(points, far), torch.nextafter(points, -far)]).clamp(-448, 448)
    args = FP8.weight_args()
    one = torch.ones(1, dtype=dtype)
    same_bits(E4M3().nearest(points), their_fake_quantize(points[None], one, torch.zeros(1), args)[0].to(dtype))


def test_what_is_too_large_saturates_and_what_is_tiny_is_subnormal() -> None:
    # The scale is 448/448 = 1 by the first weight; 2⁻⁹ is the least number, and half of it ties to zero.
    weight = torch.tensor([[448.0, 2.0**-9, 2.0**-10, 3 * 2.0**-10, 2.0**-6 * 1.0625, 17.0, 19.0]])
    stored = quantize_weight(weight, FP8)
    assert stored.scale.tolist() == [[1.0]]
    # Between 16 and 32 numbers are 2 apart: 17 ties to 16, whose code is even, and 19 to 20.
    expected = [448.0, 2.0**-9, 0.0, 2.0**-8, 2.0**-6, 16.0, 20.0]
    assert stored.dequantized().flatten().tolist() == expected
    clipped = fake_quantize_weight(weight, FP8, Factors(clip_high=torch.full((1, 1, 1), 0.5)))
    assert clipped[0, 0] == 224.0
    assert clipped.isfinite().all()
    # A calibrated scale that is too small for a token: no NaN.
    x = torch.tensor([[1e3, -1e3, 5.0]])
    found = formats.fake_quantize(x, FP8_STATIC, global_scale=torch.ones(1))
    assert found.tolist() == [[448.0, -448.0, 5.0]]


# --- Agreement with compressed-tensors ---


def their_weight(weight: Tensor, args: QuantizationArgs, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, dequantized)"""
    zero = torch.zeros_like(scale)
    return (
        their_quantize(weight, scale, zero, args, dtype=torch.float8_e4m3fn),
        their_fake_quantize(weight, scale, zero, args),
    )


@given(matrices(), st.sampled_from([None, torch.bfloat16, torch.float16]))
def test_weights_have_compressed_tensors_scales_and_codes(weight: Tensor, dtype: torch.dtype | None) -> None:
    args = FP8.weight_args()
    stored = quantize_weight(weight, FP8, scale_dtype=dtype)
    if dtype is None:
        scale, _ = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), args)
        above = scale > 1e-5
        same_bits(stored.scale[above], scale[above])
    codes, dequantized = their_weight(weight, args, stored.scale)
    assert torch.equal(stored.codes.view(torch.uint8), codes.view(torch.uint8))
    same_bits(stored.dequantized(), dequantized)
    same_bits(fake_quantize_weight(weight, FP8, scale_dtype=dtype), dequantized)


@given(st.integers(1, 300), st.integers(1, 2), st.integers(0, 99))
def test_blocks_have_compressed_tensors_codes(rows: int, blocks: int, seed: int) -> None:
    """Also where the last row of blocks is not full."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 128 * blocks, generator=generator) * torch.rand(rows, 1, generator=generator)
    stored = quantize_weight(weight, FP8_BLOCK)
    assert stored.scale.shape == FP8_BLOCK.scale_shape(weight.shape) == (-(-rows // 128), blocks)
    largest = max(float(weight[128 * row : 128 * row + 128, :128].abs().amax()) for row in range(len(stored.scale)))
    torch.testing.assert_close(float(stored.scale[:, 0].max()) * 448, largest)
    codes, dequantized = their_weight(weight, FP8_BLOCK.weight_args(), stored.scale)
    assert torch.equal(stored.codes.view(torch.uint8), codes.view(torch.uint8))
    same_bits(stored.dequantized(), dequantized)
    same_bits(fake_quantize_weight(weight, FP8_BLOCK), dequantized)


@given(matrices(st.integers(1, 3).map(lambda groups: 32 * groups)))
def test_powers_of_two_scale_as_compressed_tensors_does(weight: Tensor) -> None:
    args = preset_name_to_scheme("MXFP8A16", []).weights
    stored = quantize_weight(weight, MXFP8)
    groups = weight.unflatten(-1, (-1, 32))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    same_bits(stored.scale, scale)
    same_bits(stored.dequantized(), their_fake_quantize(weight, scale, zero, args))


TOKENS, GROUPS, POWERS = (format.input_args() for format in (FP8, FP8_BLOCK_INPUTS, MXFP8))


@pytest.mark.parametrize(
    ("args", "dtype"),
    [
        *((args, dtype) for args in (TOKENS, GROUPS) for dtype in HALVES),
        *(
            (POWERS, dtype) for dtype in HALVES[:2]
        ),  # float16 lacks small powers of two; such checkpoints compute in bf16
    ],
    ids=str,
)
@given(matrices(st.just(256)))
def test_activations_are_compressed_tensors(args: QuantizationArgs, dtype: torch.dtype, x: Tensor) -> None:
    tokens = x.clamp(-3e4, 3e4).to(dtype)[None].repeat(2, 1, 1)
    tokens[1] *= 0.5
    scale, zero = compute_dynamic_scales_and_zp(tokens, args, nn.Module())
    same_bits(formats.fake_quantize(tokens, format_of(args)), their_fake_quantize(tokens, scale, zero, args))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@given(matrices(st.just(64)), st.floats(0.25, 4))
def test_calibrated_activations_are_compressed_tensors(dtype: torch.dtype, x: Tensor, larger: float) -> None:
    tokens = x.clamp(-3e4, 3e4).to(dtype)[None]
    scale = FP8_STATIC.global_scale(tokens.abs().amax() * larger, dtype)
    assert scale is not None
    assert scale.dtype == dtype
    theirs = their_fake_quantize(tokens, scale, torch.zeros(1), FP8_STATIC.input_args())
    same_bits(formats.fake_quantize(tokens, FP8_STATIC, global_scale=scale), theirs)


@pytest.mark.parametrize(
    ("name", "weights", "inputs"),
    [
        ("FP8_DYNAMIC", FP8, FP8),
        ("FP8_BLOCK", FP8_BLOCK, FP8_BLOCK_INPUTS),
        ("MXFP8", MXFP8, MXFP8),
        ("FP8", None, FP8_STATIC),
        ("W4AFP8", None, FP8),
    ],
)
def test_formats_are_described_as_compressed_tensors_presets(name: str, weights: Any, inputs: Any) -> None:
    preset = preset_name_to_scheme(name, [])
    ours = Scheme.of_formats(weights or FP8, inputs)
    alike = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "scale_dtype")
    for mine, theirs in ((ours.weights, preset.weights), (ours.inputs, preset.input_activations)):
        if mine is not ours.weights or weights is not None:
            assert {key: getattr(mine, key) for key in alike} == {key: getattr(theirs, key) for key in alike}
    assert format_of(ours.inputs) == inputs
    assert format_of(ours.weights) == (weights or FP8)


# --- Gradients ---


def in_blocks(weight: Tensor, clip_low: Tensor, clip_high: Tensor, size: int, row: Tensor, column: Tensor) -> Tensor:
    """Blocks of `size` × `size` by a plain chain of differentiable operations; the weight's sides are multiples."""
    y = weight * row[:, None] * column
    blocks = y.unflatten(1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2)
    low = blocks.amin((2, 3), keepdim=True).clamp(max=0) * clip_low[..., None]
    high = blocks.amax((2, 3), keepdim=True).clamp(min=0) * clip_high[..., None]
    scale = torch.maximum(-low, high) / 448
    place = (blocks / scale).clamp(-448, 448)
    q = straight_through(place, place.to(torch.float8_e4m3fn).double())
    return (q * scale).transpose(1, 2).flatten(2).flatten(0, 1)


def test_gradients_of_blocks_are_plain_autograds() -> None:
    generator = torch.Generator().manual_seed(0)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return (low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)).requires_grad_()

    format = formats.NumberFormat(E4M3(), FP8.scales, 8, 8)
    weight = torch.randn(24, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    arguments = {
        "row": between(0.5, 2, 24),
        "column": between(0.5, 2, 16),
        "clip_low": between(0.4, 0.8, 3, 2, 1),
        "clip_high": between(0.4, 0.8, 3, 2, 1),
    }
    ours = fake_quantize_weight(weight, format, Factors(**arguments))
    theirs = in_blocks(weight, size=8, **arguments)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)  # a cast to E4M3 goes by way of float32
    upstream = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    inputs = [weight, *arguments.values()]
    for one, other in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream), strict=True
    ):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * float(other.abs().max()))


def test_an_offset_of_one_is_the_next_number() -> None:
    """Whatever the size of a weight: from each positive number up to the next."""
    ladder = NUMBERS[NUMBERS >= 0].unique()
    weight = torch.cat([ladder[:-1], torch.tensor([448.0])])[None]  # the last sets the scale to one
    offset = torch.ones_like(weight)
    offset[0, -1] = 0
    offset.requires_grad_()
    moved = fake_quantize_weight(weight, FP8, Factors(offset=offset))
    assert torch.equal(moved[0, :-1], ladder[1:])
    (gradient,) = torch.autograd.grad(moved.sum(), offset)
    torch.testing.assert_close(gradient[0, :-1], ladder[1:] - ladder[:-1], rtol=0, atol=0)


def test_compiled_numbers_are_the_plain_ones() -> None:
    x = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    x[0] = 0.0
    plain = formats.fake_quantize(x, FP8)
    with kernels.using("compiled"):
        same_bits(formats.fake_quantize(x, FP8), plain)


def test_compensated_rounding_answers_better() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(16, 64, generator=generator)
    x = torch.randn(200, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    offset = compensating_offsets(weight, x.T @ x, FP8)
    errors = [
        float((x @ (stored.dequantized() - weight).T).square().mean())
        for stored in (quantize_weight(weight, FP8, Factors(offset=offset)), quantize_weight(weight, FP8))
    ]
    assert errors[0] < 0.7 * errors[1]


# --- How they are asked for ---


def test_names_stand_for_fields() -> None:
    recipe = Recipe.preset("lrquant+", format="fp8")
    assert (recipe.format_name, recipe.wbits, recipe.abits, recipe.quantize_attention) == ("FP8", 8, 8, False)
    assert recipe.rotation_vectors  # folds into the channels' scales
    assert not Recipe.preset("lrquant+", format="fp8-block").rotation_vectors
    assert Recipe.preset("lrquant", format="fp8a16").scheme.inputs is None
    hopper = Recipe.preset("lrquant", format="w4a8-fp8")
    assert (hopper.format_name, hopper.symmetric, hopper.group_size) == ("W4A8-FP8 g128", True, 128)
    assert hopper.scheme.inputs == FP8.input_args()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"format": "fp8", "wbits": 4}, "wbits = 4: the format fp8 has 8; "),
        ({"numbers": "fp8", "wbits": 8, "abits": 4}, "FP8 has 8 bits per weight, and 8 or 16 per activation: not W8A4"),
        ({"format": "fp8", "group_size": 64}, "FP8 has a fixed group size"),
        ({"format": "fp8-block", "rotation_vectors": True}, "FP8-BLOCK's scales cannot hold a rotation"),
        ({"format": "fp8", "quantize_attention": True}, "FP8 does not quantize queries, keys and values"),
        ({"format": "nvfp4", "input_numbers": "fp8"}, "no runtime supports FP8 activations with NVFP4 weights"),
        (
            {"input_numbers": "fp8-static", "wbits": 4, "abits": 8},
            "no runtime supports FP8-STATIC activations with INT",
        ),
        ({"input_numbers": "fp8", "wbits": 4, "abits": 4}, "FP8 has 8 bits per activation, not 4"),
        ({"numbers": "fp9"}, "numbers = 'fp9': there are nvfp4, "),
    ],
)
def test_what_a_format_cannot_be(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        Recipe.preset("lrquant", **changes)
