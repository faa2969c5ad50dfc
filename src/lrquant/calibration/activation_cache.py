"""The activation cache: keeps the two streams of hidden states while blocks are learned.

A stream is a list of one tensor per sample, (1, tokens, hidden) for a language model. It is kept on the device, in host
memory, or in an unnamed file that is read by memory mapping. An unnamed file disappears with its process, however that
ends. Writes use the file instead of the map, so that a full disk gives an error message and not a bus error.

| where | costs | for |
|---|---|---|
| device | device memory | few or short samples: nothing is copied |
| host | host memory, one copy over the bus per use | the ordinary case |
| disk | disk space, page cache as far as there is some | samples that do not fit into memory |
"""

import mmap
import os
import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from lrquant.errors import LrquantError, UsageError
from lrquant.runtime.memory import available_bytes, free_device_bytes

Where = Literal["auto", "device", "host", "disk"]
DEVICE_SHARE, HOST_SHARE = 0.25, 0.5  # of what is free, that `auto` gives to streams


class Stream(Sequence[Tensor]):
    """Hidden states of every sample; assigning an item stores it where the stream is kept."""

    @abstractmethod
    def append(self, hidden: Tensor) -> None: ...

    @abstractmethod
    def __setitem__(self, sample: int, hidden: Tensor) -> None: ...

    def __iter__(self) -> Iterator[Tensor]:
        return (self[sample] for sample in range(len(self)))


class InMemory(Stream):
    """On one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tensors: list[Tensor] = []

    def append(self, hidden: Tensor) -> None:
        self._tensors.append(hidden.to(self.device))

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, sample: int) -> Tensor:  # type: ignore[override]
        return self._tensors[sample]

    def __setitem__(self, sample: int, hidden: Tensor) -> None:
        self._tensors[sample] = hidden.to(self.device)


class OnDisk(Stream):
    """In an unnamed file in `folder`. Items are read-only views of the file."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, closed with the stream
        self._slots: list[tuple[int, torch.Size, torch.dtype]] = []  # (offset, shape, dtype)
        self._end = 0

    def append(self, hidden: Tensor) -> None:
        self._slots.append((self._end, hidden.shape, hidden.dtype))
        self._write(self._end, hidden)
        pages = -(-hidden.nbytes // mmap.ALLOCATIONGRANULARITY)  # maps begin on page boundaries
        self._end += pages * mmap.ALLOCATIONGRANULARITY

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, sample: int) -> Tensor:  # type: ignore[override]
        offset, shape, dtype = self._slots[sample]
        length = shape.numel() * dtype.itemsize
        view = mmap.mmap(self._file.fileno(), length, mmap.MAP_SHARED, offset=offset)
        return torch.frombuffer(view, dtype=dtype).view(shape)  # the map lives as long as the tensor

    def __setitem__(self, sample: int, hidden: Tensor) -> None:
        offset, shape, dtype = self._slots[sample]
        if (hidden.shape, hidden.dtype) != (shape, dtype):
            raise ValueError(f"a block turned {tuple(shape)} of {dtype} into {tuple(hidden.shape)} of {hidden.dtype}")
        self._write(offset, hidden)

    def _write(self, offset: int, hidden: Tensor) -> None:
        content = memoryview(hidden.contiguous().cpu().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
        try:
            while content:
                written = os.pwrite(self._file.fileno(), content, offset)
                content, offset = content[written:], offset + written
        except OSError as error:
            raise LrquantError(
                f"the activation cache cannot be written ({error.strerror}); free some disk space"
            ) from error


class ActivationStore:
    """Creates streams. `auto` decides where to keep them once the first sample shows their size.

    Args:
        where: `device`, `host`, `disk`, or `auto`.
        device: what the blocks run on.
        folder: for files.
        samples, streams: the number of each.
        sharing: how many such caches share this machine's memory.
    """

    def __init__(
        self, where: Where, device: torch.device, folder: Path, samples: int, streams: int, sharing: int = 1
    ) -> None:
        if where not in get_args(Where):
            raise UsageError(f"activations {where!r}: choose device, host, disk or auto")
        self.where = where
        self._device, self._folder, self._count, self._sharing = device, folder, samples * streams, sharing
        self.bytes_expected = 0

    def stream(self, first: Tensor) -> Stream:
        """An empty stream for samples like `first`."""
        self.expect(first)
        if self.where == "disk":
            return OnDisk(self._folder)
        return InMemory(self._device if self.where == "device" else torch.device("cpu"))

    def expect(self, first: Tensor) -> None:
        """Decide where samples like `first` will be."""
        self.bytes_expected = max(self.bytes_expected, first.nbytes * self._count)
        if self.where == "auto":
            self.where = self._decide()

    def copy(self, stream: Sequence[Tensor]) -> Stream:
        """A stream of its own with the same contents."""
        result = self.stream(stream[0])
        for hidden in stream:
            result.append(hidden.clone())
        return result

    def _decide(self) -> Where:
        if self._device.type != "cpu" and self.bytes_expected < DEVICE_SHARE * free_device_bytes(self._device):
            return "device"
        return "host" if self.bytes_expected < HOST_SHARE * available_bytes() / self._sharing else "disk"
