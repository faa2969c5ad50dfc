"""The table of number formats: what is in it, and that nothing is taken for something else."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme

from lrquant.cli.completion import format_names
from lrquant.errors import UsageError
from lrquant.formats import NamedFormat, format_of, register
from lrquant.formats.fp4 import E2M1, MXFP4, NVFP4
from lrquant.formats.integers import integers
from lrquant.formats.presets import FORMATS, TABLE
from lrquant.formats.qparams import Symmetric
from lrquant.recipe import Recipe


@pytest.mark.parametrize("name", FORMATS)
def test_every_name_is_a_recipe_whose_scheme_is_read_back_as_the_tables_formats(name: str) -> None:
    recipe = Recipe.preset("lrquant", format=name)
    weights, inputs = TABLE[recipe.numbers], TABLE[recipe.input_numbers or recipe.numbers]
    assert recipe.scheme.weights is not None
    wanted = weights.for_weights(recipe.wbits, recipe.group_size, recipe.symmetric)
    assert format_of(recipe.scheme.weights) == wanted
    if recipe.scheme.inputs is not None:
        assert format_of(recipe.scheme.inputs) == inputs.for_inputs(recipe.abits, recipe.activations_symmetric)


@pytest.mark.parametrize(("name", "format"), [("NVFP4", NVFP4), ("MXFP4", MXFP4)])
def test_formats_are_described_as_compressed_tensors_presets(name: str, format: object) -> None:
    preset = preset_name_to_scheme(name, [])
    assert format_of(preset.weights) == format_of(preset.input_activations) == format
    row = TABLE[name.lower()]
    dumped = [args.model_dump(mode="json") for args in (row.weights.weight_args(), row.inputs.input_args())]
    assert dumped == [args.model_dump(mode="json") for args in (preset.weights, preset.input_activations)]


def test_a_float_format_is_what_it_says_or_refused() -> None:
    """Four-bit floats in other groups with plain scales are neither NVFP4 nor MXFP4."""
    plain = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=64)
    assert format_of(plain).scales == Symmetric()
    assert format_of(plain).group_size == 64
    e5m2_like = QuantizationArgs(num_bits=5, type="float", strategy="group", group_size=32, zp_dtype=torch.int8)
    with pytest.raises(UsageError, match=r"number format float5, group of 32: not known; there are nvfp4, "):
        format_of(e5m2_like)
    odd_scales = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=64, scale_dtype=torch.uint8)
    with pytest.raises(UsageError, match="number format float4, group of 64: not known"):
        format_of(odd_scales)


def test_names_and_elements_are_taken_once() -> None:
    with pytest.raises(UsageError, match="format 'nvfp4': the name is taken"):
        register(NamedFormat("nvfp4", NVFP4, NVFP4))

    class Impostor(E2M1):
        pass

    other = type(NVFP4)(Impostor(), NVFP4.scales, 16)
    with pytest.raises(UsageError, match="cannot distinguish"):
        register(NamedFormat("nvfp4-too", other, other))
    assert "nvfp4-too" not in TABLE


def test_the_shell_offers_every_name() -> None:
    assert sorted(format_names("")) == sorted(FORMATS)


def test_what_a_weight_costs() -> None:
    shape = (64, 128)
    assert NVFP4.weight_bits(shape, torch.bfloat16) == 64 * 128 * 4 + 64 * 8 * 8
    assert integers(4, True, 32).weight_bits(shape, torch.bfloat16) == 64 * 128 * 4 + 64 * 4 * 16
