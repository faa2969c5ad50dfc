"""Two codes in a byte, and back."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lrquant.formats.nibbles import from_nibbles, to_nibbles


@given(seed=st.integers(0, 99), rows=st.integers(1, 5), pairs=st.integers(1, 9), signed=st.booleans())
def test_codes_come_back(seed: int, rows: int, pairs: int, signed: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, dtype = (-8, torch.int8) if signed else (0, torch.uint8)
    codes = torch.randint(low, low + 16, (rows, 2 * pairs), generator=generator).to(dtype)
    packed = to_nibbles(codes)
    assert packed.shape == (rows, pairs)
    assert packed.dtype == torch.uint8
    assert torch.equal(from_nibbles(packed, dtype), codes)
    assert from_nibbles(packed, dtype).dtype == dtype


def test_the_first_of_a_pair_lies_in_the_low_half() -> None:
    assert to_nibbles(torch.tensor([[1, 2]], dtype=torch.uint8)).tolist() == [[0x21]]
