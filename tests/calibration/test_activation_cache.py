"""The activation store: wherever streams live, the same tensors come back and the same model comes out."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lrquant import LrquantError, UsageError
from lrquant.calibration import activation_cache as store
from lrquant.calibration.activation_cache import ActivationStore, InMemory, OnDisk, Where
from lrquant.calibration.capture import BlockInputs
from lrquant.reconstruction.block_forward import BlockForward

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(tokens=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_files_give_back_what_was_put_in(dtype: torch.dtype, tokens: list[int], seed: int) -> None:
    """Samples of different lengths, overwritten in any order."""
    generator = torch.Generator().manual_seed(seed)
    stream = OnDisk(Path(tempfile.gettempdir()))
    expected = [torch.randn(1, count, 33, generator=generator).to(dtype) for count in tokens]
    for hidden in expected:
        stream.append(hidden)
    for sample in torch.randperm(len(tokens), generator=generator).tolist():
        expected[sample] = expected[sample] * 2
        stream[sample] = expected[sample]
    assert len(stream) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(stream, expected, strict=True))


class Careless(nn.Module):
    """A block that writes into what it is given."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.add_(1)


@pytest.mark.parametrize("where", ["host", "disk"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_block_that_writes_into_its_input_leaves_the_stream(batch: int, where: Where, tmp_path: Path) -> None:
    activations = ActivationStore(where, CPU, tmp_path, 2, 2)
    stream = activations.stream(torch.zeros(1, 4, 8))
    for _ in range(2):
        stream.append(torch.zeros(1, 4, 8))
    calls = BlockForward(Careless(), 0, BlockInputs(stream, [[{}]]), CPU, batch)
    assert all(bool((output == 1).all()) for output in calls.outputs(stream, activations))
    assert all(bool((hidden == 0).all()) for hidden in stream)


def test_a_file_leaves_nothing_in_its_folder(tmp_path: Path) -> None:
    stream = OnDisk(tmp_path)
    stream.append(torch.ones(1, 4, 8))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "pwrite", full)
    with pytest.raises(LrquantError, match="activation cache cannot be written \\(No space left on device\\)"):
        OnDisk(tmp_path).append(torch.ones(1, 4, 8))


@pytest.mark.parametrize(("free", "where"), [(10_000, "host"), (1_500, "disk")], ids=["there is room", "there is not"])
def test_auto_goes_by_what_is_free(free: int, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two streams of four samples of 128 bytes are 1024; half of what is free may be taken."""
    monkeypatch.setattr(store, "available_bytes", lambda: free)
    activations = ActivationStore("auto", CPU, tmp_path, samples=4, streams=2)
    stream = activations.stream(torch.zeros(1, 4, 8))
    assert activations.where == where
    assert activations.bytes_expected == 1024
    assert isinstance(stream, OnDisk if where == "disk" else InMemory)


def test_an_unknown_place_is_named() -> None:
    with pytest.raises(UsageError, match="'tape'"):
        ActivationStore("tape", CPU, Path(), 1, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["device", "host", "disk"])
def test_a_copy_is_a_stream_of_its_own(where: Where, tmp_path: Path) -> None:
    activations = ActivationStore(where, CPU, tmp_path, 2, 2)
    stream = activations.stream(torch.zeros(1, 2, 2))
    stream.append(torch.zeros(1, 2, 2))
    copy = activations.copy(stream)
    stream[0] = torch.ones(1, 2, 2)
    assert torch.equal(copy[0], torch.zeros(1, 2, 2))
