"""Which formats can be asked for, how they are described, and how they lie on disk."""

import pytest
import torch
from compressed_tensors.config import CompressionFormat

from lrquant.errors import UsageError
from lrquant.formats import Scheme, format_of
from lrquant.formats.fp4 import MXFP4, NVFP4
from lrquant.formats.integers import integers
from lrquant.formats.layout import pads_zero_points, product_dtype, storage_format
from lrquant.formats.schemes import activation_args, per_token_for_flat_inputs, weight_args


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 17])
def test_widths_out_of_range_are_named(bits: int) -> None:
    with pytest.raises(UsageError, match=rf"^wbits = {bits}: .*2 to 8"):
        weight_args(bits)
    with pytest.raises(UsageError, match=rf"^abits = {bits}: .*2 to 8"):
        activation_args(bits)


@pytest.mark.parametrize("group_size", [0, -4])
def test_group_sizes_out_of_range_are_named(group_size: int) -> None:
    with pytest.raises(UsageError, match=rf"^group size {group_size}: "):
        weight_args(4, group_size)


def test_sixteen_bits_leave_a_tensor_alone() -> None:
    assert Scheme.integer(4, 16).inputs is None
    assert Scheme.integer(16, 8).weights is None
    assert Scheme.integer(4, 16, quantize_attention=True).attention is None


def test_attention_has_the_activations_format_when_asked() -> None:
    assert Scheme.integer(4, 4).attention is None
    scheme = Scheme.integer(4, 6, activations_symmetric=True, quantize_attention=True)
    assert scheme.attention == scheme.inputs == activation_args(6, symmetric=True)


def test_grids_follow_their_description() -> None:
    assert format_of(weight_args(3, 64, symmetric=True)) == integers(3, True, 64)
    assert format_of(activation_args(8)) == integers(8, False, None)
    format = integers(4)
    assert (format.low, format.high, format.steps) == (-8, 7, 15)  # signed four-bit integers


def test_flat_inputs_get_one_group_as_wide_as_the_row() -> None:
    scheme = Scheme.integer(4, 8)
    assert scheme.for_linear(48, flat_input=False).input_activations == scheme.inputs
    flat = scheme.for_linear(48, flat_input=True).input_activations
    assert flat == per_token_for_flat_inputs(activation_args(8), 48)
    assert flat is not None
    assert (flat.strategy, flat.group_size, flat.dynamic) == ("group", 48, True)


@pytest.mark.parametrize(
    ("scheme", "stored", "padded", "product"),
    [
        (Scheme.integer(4, 4), CompressionFormat.pack_quantized, True, torch.float32),
        (Scheme.integer(4, 4, symmetric=True), CompressionFormat.pack_quantized, False, torch.float32),
        (Scheme.integer(3, 16, group_size=64), CompressionFormat.pack_quantized, False, torch.bfloat16),
        (Scheme.integer(8, 8), CompressionFormat.int_quantized, False, torch.float32),
        (Scheme.integer(8, 16), CompressionFormat.pack_quantized, False, torch.bfloat16),
        (Scheme.integer(4, 8), CompressionFormat.pack_quantized, True, torch.float32),
        (Scheme.integer(4, 8, symmetric=True), CompressionFormat.int_quantized, False, torch.float32),
        (Scheme.of_formats(NVFP4, NVFP4), CompressionFormat.nvfp4_pack_quantized, False, torch.bfloat16),
        (Scheme.of_formats(MXFP4), CompressionFormat.mxfp4_pack_quantized, False, torch.bfloat16),
        (Scheme.integer(16, 8), CompressionFormat.dense, False, torch.float32),
    ],
    ids=[
        "W4A4",
        "W4A4 symmetric",
        "W3A16 g64",
        "W8A8",
        "W8A16",
        "W4A8",
        "W4A8 symmetric",
        "NVFP4",
        "MXFP4A16",
        "W16A8",
    ],
)
def test_layout_on_disk(scheme: Scheme, stored: CompressionFormat, padded: bool, product: torch.dtype) -> None:
    assert storage_format(scheme) is stored
    assert pads_zero_points(scheme) is padded
    assert product_dtype(scheme, torch.bfloat16) is product
