"""A journal's tensors hold a block as it was learned, whichever its format; packing them rounds nothing."""

from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme

from lrquant.export.packing import pack_weight
from lrquant.formats import Factors, Scheme, format_of, quantize_weight
from lrquant.formats.fp4 import MXFP4, NVFP4
from lrquant.formats.fp8 import FP8, FP8_BLOCK, MXFP8
from lrquant.formats.layout import product_dtype, storage_format
from lrquant.reconstruction.block_parameters import FrozenBlock
from lrquant.resume.frozen_tensors import frozen_block, tensors_of

STORED = torch.bfloat16
SCHEMES = {
    "w4a4": Scheme.integer(4, 4),
    "w4a16-g32": Scheme.integer(4, group_size=32),
    "w4a16-g32 symmetric": Scheme.integer(4, group_size=32, symmetric=True),
    "w3a16": Scheme.integer(3),
    "w2a16-g64": Scheme.integer(2, group_size=64),
    "w8a8": Scheme.integer(8, 8, symmetric=True),
    "w6a6": Scheme.integer(6, 6),
    "bits": replace(Scheme.integer(4, group_size=32), bits={"up": 3}),
    "nvfp4": Scheme.of_formats(NVFP4, NVFP4),
    "mxfp4": Scheme.of_formats(MXFP4, MXFP4),
    "fp8": Scheme.of_formats(FP8, FP8),
    "fp8-block": Scheme.of_formats(FP8_BLOCK),
    "mxfp8": Scheme.of_formats(MXFP8, MXFP8),
}


def frozen_in(scheme: Scheme, *, rows: int = 48, columns: int = 128) -> FrozenBlock:
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for linear in ("up", "down"):
        weight = torch.randn(rows, columns, generator=generator)
        weight[0] = 0
        args = scheme.of(linear).weights
        assert args is not None
        format = format_of(args)
        global_scale = format.global_scale(weight.abs().max(), STORED)
        weights[linear] = quantize_weight(weight, format, Factors(), STORED, global_scale)
    dense = {"norm.weight": torch.ones(columns, dtype=STORED)}
    return FrozenBlock(weights, dense, product_dtype(scheme, STORED), {"up.input_global_scale": torch.ones(1)})


@pytest.mark.parametrize("name", SCHEMES)
def test_a_block_comes_back_as_it_was(name: str) -> None:
    scheme = SCHEMES[name]
    frozen = frozen_in(scheme)
    again = frozen_block(tensors_of(frozen), scheme, STORED)
    for linear, weight in frozen.weights.items():
        read = again.weights[linear]
        assert torch.equal(read.codes.float(), weight.codes.float())
        assert read.codes.dtype == weight.codes.dtype
        assert torch.equal(read.scale, weight.scale)
        assert read.format == weight.format
        assert (read.zero is None) == (weight.zero is None)
        assert read.zero is None or weight.zero is None or torch.equal(read.zero, weight.zero)
    before, after = frozen.parameters(torch.float32), again.parameters(torch.float32)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert again.static_scales.keys() == frozen.static_scales.keys()


def test_an_odd_row_is_kept_byte_by_byte() -> None:
    scheme = Scheme.integer(4, 4)
    frozen = frozen_in(scheme, columns=33)
    tensors = tensors_of(frozen)
    assert "codes:up" in tensors
    assert "nibbles:up" not in tensors
    read = frozen_block(tensors, scheme, STORED)
    assert torch.equal(read.weights["up"].codes, frozen.weights["up"].codes)


@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "bits"])
def test_packed_integers_are_what_compressed_tensors_makes_of_the_weight(name: str) -> None:
    """Its own packer quantizes the dequantized weight; ours never leaves the integers."""
    scheme = SCHEMES[name]
    for linear, weight in frozen_in(scheme).weights.items():
        ours = pack_weight(weight, scheme, STORED)
        stored = storage_format(scheme)
        scale = weight.scale.clone()
        given = {"weight": weight.dequantized(), "weight_scale": scale}
        if weight.global_scale is not None:
            given["weight_global_scale"] = weight.global_scale
            given["weight_scale"] = scale * weight.global_scale
        if weight.zero is not None:
            given["weight_zero_point"] = weight.zero
        packer = BaseCompressor.get_value_from_registry(stored.value)
        theirs = packer.compress(given, QuantizationScheme(targets=[], weights=scheme.weights))
        part = "weight_packed" if "weight_packed" in theirs else "weight"
        assert torch.equal(ours[part].view(torch.uint8), theirs[part].contiguous().view(torch.uint8)), linear
        own = theirs["weight_scale"].to(STORED) if weight.format.scales.unpacked is None else theirs["weight_scale"]
        assert ours["weight_scale"].dtype == own.dtype
        assert torch.equal(ours["weight_scale"].float(), own.float())
        if weight.zero is not None:
            rows = theirs["weight_zero_point"].shape[0]
            assert torch.equal(ours["weight_zero_point"][:rows], theirs["weight_zero_point"])
