"""Integers in llama.cpp's blocks, against gguf's own dequantization."""

import pytest
import torch

from lrquant.errors import UsageError
from lrquant.export.gguf.blocks import MOST_ERROR, largest_error, pack
from lrquant.formats import format_of
from lrquant.formats.fake_quant import QuantizedWeight
from lrquant.formats.schemes import weight_args
from lrquant.runtimes.llama_cpp import BlockFormat, block_format
from lrquant.runtimes.stored_format import Numbers

pytest.importorskip("gguf")


def chosen(bits: int, group: int | None, symmetric: bool) -> BlockFormat:
    return block_format(Numbers("int", bits, symmetric, "group" if group else "channel", group))


def random_weight(bits: int, group: int | None, symmetric: bool, seed: int = 0) -> QuantizedWeight:
    """Every integer there is, scales from the smallest (1e-5) to large ones, zero points at their ends too."""
    generator = torch.Generator().manual_seed(seed)
    low, high = -(1 << bits - 1), 1 << bits - 1
    integers = torch.randint(low, high, (48, 128), generator=generator, dtype=torch.int8)
    integers[0, : high - low] = torch.arange(low, high, dtype=torch.int8)[:128]
    groups = 1 if group is None else 128 // group
    scale = (10 ** (torch.rand(48, groups, generator=generator) * 6 - 5)).bfloat16()
    zero = None if symmetric else torch.randint(low, high, (48, groups), generator=generator, dtype=torch.int8)
    if zero is not None:
        zero[0], zero[1] = low, high - 1
    return QuantizedWeight(integers, scale, zero, format_of(weight_args(bits, group, symmetric)))


# Two and three bits with a zero point, and six and seven, fit the signed codes of the next larger block.
EXACT = [(2, False), (3, False), (6, False), (7, False), *((bits, True) for bits in range(2, 9))]
EXPECTED = {2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 7: "Q8_0", 8: "Q8_0"}


@pytest.mark.parametrize("group", [None, 32, 64])
@pytest.mark.parametrize(("bits", "symmetric"), EXACT)
def test_every_weight_is_equal(bits: int, symmetric: bool, group: int | None) -> None:
    weight = random_weight(bits, group, symmetric)
    known = chosen(bits, group, symmetric)
    assert known.name == EXPECTED[bits]
    assert largest_error(pack(weight, bits, known), weight, known) == 0


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize(("bits", "name"), [(4, "Q4_1"), (5, "Q5_1")])
def test_a_minimum_in_float16_is_off_by_half_a_thousandth_at_most(bits: int, name: str, group: int | None) -> None:
    known = chosen(bits, group, False)
    assert known.name == name
    for seed in range(3):
        weight = random_weight(bits, group, False, seed)
        # All eight bits of bfloat16's mantissa, so that multiples of it do not fit float16's eleven.
        weight = weight._replace(scale=torch.full_like(weight.scale, 201 / 2**14))
        assert 0 < largest_error(pack(weight, bits, known), weight, known) < MOST_ERROR


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "said"),
    [(4, 16, True, "multiples of 32"), (4, 48, True, "multiples of 32"), (8, None, False, "use --symmetric")],
)
def test_what_no_block_holds_is_refused(bits: int, group: int | None, symmetric: bool, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        chosen(bits, group, symmetric)


def test_scales_beyond_float16_are_refused() -> None:
    weight = random_weight(4, 32, True)
    weight = weight._replace(scale=weight.scale.float() * 1.001)
    with pytest.raises(UsageError, match="float32 precision"):
        pack(weight, 4, chosen(4, 32, True))
