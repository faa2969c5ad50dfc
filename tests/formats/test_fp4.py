"""Four-bit floats against compressed-tensors value by value, ties included, against plain autograd, and by hand."""

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import FP4_E2M1_DATA, QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as their_fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp, generate_gparam
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lrquant import formats
from lrquant.errors import UsageError
from lrquant.formats import Factors, NumberFormat, fake_quantize_weight, format_of, fp4, kernels, quantize_weight
from lrquant.formats.fake_quant import largest_weight
from lrquant.formats.gptq import compensating_offsets
from lrquant.formats.mx import power_of_two_scale
from lrquant.recipe import Recipe
from tests.formats.test_fake_quant import matrices, same_bits
from tests.reference import straight_through

FORMATS = ["nvfp4", "mxfp4"]
MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
HALVES = [torch.float32, torch.bfloat16]


FORMAT = {"nvfp4": fp4.NVFP4, "mxfp4": fp4.MXFP4}


def global_scale_of(weight: Tensor, format: NumberFormat, factors: Factors = Factors()) -> Tensor | None:  # noqa: B008
    return format.global_scale(largest_weight(weight, factors))


def fake_quantize(x: Tensor, args: QuantizationArgs, global_scale: Tensor | None = None) -> Tensor:
    return formats.fake_quantize(x, format_of(args), global_scale=global_scale)


# --- Agreement with compressed-tensors ---


def every_tie_and_its_neighbours(dtype: torch.dtype) -> Tensor:
    points = torch.tensor(MAGNITUDES, dtype=torch.float64)
    points = torch.cat([points, (points[1:] + points[:-1]) / 2, torch.tensor([6.5, 7.0])])
    points = torch.cat([points, -points]).to(dtype)
    above = torch.nextafter(points, torch.full_like(points, 9))
    return torch.cat([points, above, torch.nextafter(points, torch.full_like(points, -9)), torch.linspace(-7, 7, 999)])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_numbers_are_rounded_as_compressed_tensors_casts_them(dtype: torch.dtype) -> None:
    p = every_tie_and_its_neighbours(dtype)
    ours = fp4.E2M1().nearest(p.clamp(-6, 6))
    same_bits(ours, FP4_E2M1_DATA.cast_to_fp4(p.clamp(-6, 6)))
    assert set(ours.abs().tolist()) == set(MAGNITUDES)


@pytest.mark.parametrize("name", FORMATS)
@given(matrices(st.integers(1, 3).map(lambda groups: 32 * groups)))
def test_weights_have_compressed_tensors_scales_and_numbers(name: str, weight: Tensor) -> None:
    args = preset_name_to_scheme(f"{name}A16", []).weights
    format = format_of(args)
    global_scale = generate_gparam(weight.amin(), weight.amax()) if format.scales.has_global else None
    if global_scale is not None:
        same_bits(global_scale_of(weight, format), global_scale)
    ours = quantize_weight(weight, format, global_scale=global_scale)
    groups = weight.unflatten(-1, (-1, args.group_size))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale)
    same_bits(ours.scale, scale if global_scale is None else scale / global_scale)
    theirs = their_fake_quantize(weight, scale, zero, args, global_scale)
    same_bits(ours.dequantized(), theirs)
    same_bits(fake_quantize_weight(weight, format, global_scale=global_scale), theirs)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
@given(matrices(st.just(64)), st.floats(0.25, 4))
def test_activations_are_compressed_tensors(name: str, dtype: torch.dtype, x: Tensor, larger: float) -> None:
    """Also where the calibrated scale was found on larger or smaller inputs."""
    args = preset_name_to_scheme(name, []).input_activations
    tokens = x.to(dtype)[None].repeat(2, 1, 1)
    tokens[1] *= 0.5
    global_scale = None
    if name == "nvfp4":
        global_scale = generate_gparam(tokens.float().amin() * larger, tokens.float().amax() * larger)
    scale, zero = compute_dynamic_scales_and_zp(tokens, args, nn.Module(), global_scale)
    same_bits(
        fake_quantize(tokens, args, global_scale=global_scale),
        their_fake_quantize(tokens, scale, zero, args, global_scale),
    )
    flat = fake_quantize(tokens[0], args, global_scale=global_scale)
    same_bits(flat, fake_quantize(tokens, args, global_scale=global_scale)[0])


@given(st.integers(-126, 125), st.floats(1, 2, exclude_max=True, width=32))
def test_powers_of_two_of_any_size(exponent: int, mantissa: float) -> None:
    most = torch.tensor(mantissa * 2.0**exponent)
    args = preset_name_to_scheme("MXFP4A16", []).weights
    same_bits(power_of_two_scale(most, 6.0), calculate_qparams(-most, most, args)[0][0])


# --- Gradients ---


def reference(
    format: NumberFormat,
    weight: Tensor,
    row: Tensor,
    column: Tensor,
    clip_low: Tensor,
    clip_high: Tensor,
    offset: Tensor,
    gain: Tensor | None = None,
    global_scale: Tensor | None = None,
) -> Tensor:
    """A plain chain of differentiable operations."""

    def e4m3(scale: Tensor) -> Tensor:
        assert global_scale is not None
        return (scale * global_scale).clamp(max=448).to(torch.float8_e4m3fn).double() / global_scale

    groups = (weight * row[:, None] * column).unflatten(-1, (-1, format.group_size or 1))
    low = groups.amin(-1, keepdim=True).clamp(max=0) * clip_low
    most = torch.maximum(-low, groups.amax(-1, keepdim=True).clamp(min=0) * clip_high)
    if global_scale is not None:
        rounded = e4m3(most / 6)
    else:
        mantissa, exponent = torch.frexp(most)
        rounded = 2.0 ** (exponent - 3 + (mantissa >= 0.875).int())
    scale = straight_through(most / 6, rounded.double())
    p = groups / scale
    place = (p + offset.view_as(groups)).clamp(-6, 6)
    distance = (place.detach()[..., None] - torch.tensor([*MAGNITUDES, *(-size for size in MAGNITUDES)])).abs()
    q = straight_through(place, torch.tensor([*MAGNITUDES, *(-size for size in MAGNITUDES)])[distance.argmin(-1)])
    if gain is not None:
        scale = straight_through(scale * gain, e4m3(scale * gain).double())
    return (q * scale).flatten(-2)


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_gradients_are_plain_autograds(name: str, clipped: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    format = FORMAT[name]
    rows, width = 5, 64
    groups = width // (format.group_size or width)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    weight = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight[0, 1], weight[1], weight[2] = -6.0, weight[1].abs(), -weight[2].abs()
    factors = (0.4, 0.7) if clipped else (0.98, 1.0)
    arguments: dict[str, Tensor] = {
        "weight": weight,
        "row": between(0.5, 2, rows),
        "column": between(0.5, 2, width),
        "clip_low": between(*factors, rows, groups, 1),
        "clip_high": between(*factors, rows, groups, 1),
        "offset": between(-0.5, 0.5, rows, width),
    }
    if name == "nvfp4":
        arguments["gain"] = between(0.5, 1.5, rows, 1, 1)
    for tensor in arguments.values():
        tensor.requires_grad_()
    factors_given = Factors(**{key: value for key, value in arguments.items() if key != "weight"})
    global_scale = global_scale_of(weight, format, factors_given)
    ours = fake_quantize_weight(weight, format, factors_given, global_scale=global_scale)
    theirs = reference(format, **arguments, global_scale=global_scale)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    mine = torch.autograd.grad(ours, list(arguments.values()), upstream)
    plain = torch.autograd.grad(theirs, list(arguments.values()), upstream)
    for key, one, other in zip(arguments, mine, plain, strict=True):
        assert other.abs().max() > 0, key
        assert (one - other).abs().max() <= 1e-9 * other.abs().max(), key


@pytest.mark.parametrize("name", FORMATS)
def test_compensated_rounding_answers_better(name: str) -> None:
    """GPTQ's offsets make no number that the format lacks, and lower the error of the product."""
    generator = torch.Generator().manual_seed(3)
    format, weight = FORMAT[name], torch.randn(16, 64, generator=generator)
    x = torch.randn(200, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    global_scale = global_scale_of(weight, format)
    offset = compensating_offsets(weight, x.T @ x, format, global_scale=global_scale)
    compensated = quantize_weight(weight, format, Factors(offset=offset), global_scale=global_scale)
    assert set(compensated.steps().abs().unique().tolist()) <= set(MAGNITUDES)
    errors = [
        float((x @ (stored.dequantized() - weight).T).square().mean())
        for stored in (compensated, quantize_weight(weight, format, global_scale=global_scale))
    ]
    assert errors[0] < 0.7 * errors[1]


def test_compiled_floats_are_the_plain_ones() -> None:
    args = preset_name_to_scheme("NVFP4", []).input_activations
    x = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    x[0] = 0.0
    plain = fake_quantize(x, args)
    with kernels.using("compiled"):
        same_bits(fake_quantize(x, args), plain)


# --- By hand ---


def test_mxfp4_by_hand() -> None:
    # max 7 = 1.75·2²: from there on the exponent is one more, s = 2^(2+1−2) = 2. y/s = 3.5 → 4 (even), 0.5, −1.25 → −1.
    weight = torch.zeros(1, 32)
    weight[0, :3] = torch.tensor([7.0, 1.0, -2.5])
    stored = quantize_weight(weight, fp4.MXFP4)
    assert stored.scale.tolist() == [[2.0]]
    assert stored.dequantized()[0, :3].tolist() == [8.0, 1.0, -2.0]
    weight[0, 0] = 6.99  # s = 1: 6.99 → 6
    stored = quantize_weight(weight, fp4.MXFP4)
    assert stored.scale.tolist() == [[1.0]]
    assert stored.dequantized()[0, :3].tolist() == [6.0, 1.0, -2.0]


def test_nvfp4_by_hand() -> None:
    # Largest 12: g = 448·6/12 = 224. Second group's largest 3.3: 224·3.3/6 = 123.2 → 120 (E4M3's step there is 8).
    weight = torch.zeros(1, 32)
    weight[0, 0], weight[0, 16], weight[0, 17] = 12.0, 3.3, -1.0
    global_scale = global_scale_of(weight, fp4.NVFP4)
    assert global_scale is not None
    assert global_scale.tolist() == [224.0]
    stored = quantize_weight(weight, fp4.NVFP4, global_scale=global_scale)
    torch.testing.assert_close(stored.scale, torch.tensor([[448 / 224, 120 / 224]]))
    # 3.3·224/120 = 6.16 → 6; −1·224/120 = −1.87 → −2
    assert stored.steps().flatten()[[0, 16, 17]].tolist() == [6.0, 6.0, -2.0]


# --- How they are asked for ---


def test_names_stand_for_fields() -> None:
    recipe = Recipe.preset("lrquant+", format="nvfp4")
    assert (recipe.format_name, recipe.quantize_attention, recipe.rotation_vectors) == ("NVFP4", False, True)
    assert not Recipe.preset("lrquant+", format="mxfp4a16").rotation_vectors  # powers of two hold none
    assert Recipe.preset("omniquant", format="nvfp4a16").let is False
    marlin = Recipe.preset("lrquant", format="w4a16-g128", epochs=3)
    assert (marlin.wbits, marlin.abits, marlin.group_size, marlin.symmetric, marlin.epochs) == (4, 16, 128, True, 3)
    assert Recipe.preset("lrquant", numbers="nvfp4", abits=4).scheme == recipe.scheme


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"format": "fp3"}, "unknown format 'fp3': there are nvfp4, "),
        ({"format": "nvfp4", "abits": 16}, "abits = 16: the format nvfp4 has 4; "),
        ({"numbers": "nvfp4", "wbits": 3}, "NVFP4 has 4 bits per weight, and 4 or 16 per activation: not W3A4"),
        ({"format": "mxfp4", "group_size": 64}, "MXFP4 has a fixed group size"),
        ({"format": "mxfp4", "rotation_vectors": True}, "MXFP4's scales cannot hold a rotation"),
        ({"format": "nvfp4", "quantize_attention": True}, "NVFP4 does not quantize queries, keys and values"),
    ],
)
def test_what_a_format_cannot_be(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        Recipe.preset("lrquant", **changes)
