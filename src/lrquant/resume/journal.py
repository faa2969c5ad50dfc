"""The journal: finished blocks of an unfinished run, on disk.

    00012.safetensors   codes:LINEAR, scale:LINEAR, …   integers, scales, zero points (frozen_tensors.py)
                        buffer:NAME    what the block holds besides parameters
                        learned:NAME   its learnables
                        carried:NAME   learnables of later blocks, where windows overlap
                        absmax:LINEAR, midpoint:LINEAR   statistics of its linears' inputs
    bits.json           how many bits each linear gets, where that follows from measured errors
    00012.json          the checksum of that file, and the checksum of the block before it (manifest.py)

The entry is written after the tensors, so a block without one is not finished. A block was learned on the outputs of
the block before it; if that one is learned again with a different result, this one must be learned again too. On the
same machine, the result is the same bit for bit, and only the damaged block is done again.

Hidden states are not stored, because they are as large as the model. Two forward passes through the finished blocks
restore them; learning took about sixty.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lrquant.errors import LrquantError
from lrquant.formats import Scheme
from lrquant.reconstruction.block_parameters import FrozenBlock, buffers_of
from lrquant.reconstruction.journal import FinishedBlock, Journal
from lrquant.resume.frozen_tensors import frozen_block, tensors_of
from lrquant.resume.manifest import BitsEntry, BlockEntry, read_entry, write_entry
from lrquant.runtime.files import checksum, write_tensors
from lrquant.runtime.profile import timed

_FINISHED = ("learned:", "carried:", "static:", "absmax:", "midpoint:")  # what `FinishedBlock` is made of


class DiskJournal(Journal):
    """Keeps finished blocks in `folder`. `damaged` describes damaged files, whose blocks will be done again."""

    keeps_frozen = True

    def __init__(self, folder: Path, scheme: Scheme, storage_dtype: torch.dtype) -> None:
        self.folder = folder
        self.damaged: list[str] = []
        self._scheme, self._storage_dtype = scheme, storage_dtype
        self._entries: dict[int, BlockEntry] = {}
        self._whole: set[int] = set()  # blocks whose files are as their entries say

    def open(self, blocks: int) -> None:
        for place in range(blocks):
            try:
                self._entries[place] = entry = read_entry(self._file(place, "json"), BlockEntry)
                file = self._file(place, "safetensors")
                if file.stat().st_size != entry.bytes:
                    raise LrquantError(f"{file}: damaged ({file.stat().st_size} bytes instead of {entry.bytes})")
                if checksum(file) != entry.sha256:
                    raise LrquantError(f"{file}: damaged (its checksum does not match)")
                self._whole.add(place)
            except FileNotFoundError as error:
                if place in self._entries:
                    self._found(place, f"{error.filename}: missing")
            except LrquantError as error:
                self._found(place, str(error))

    def bits(self, found: Callable[[], dict[str, int]]) -> dict[str, int]:
        file = self.folder / "bits.json"
        try:
            bits = read_entry(file, BitsEntry).bits
        except (FileNotFoundError, LrquantError) as error:
            if isinstance(error, LrquantError):
                self.damaged.append(f"{error}; errors will be measured again")
            bits = found()
            write_entry(file, BitsEntry(bits=bits))
        self._scheme = replace(self._scheme, bits=bits)
        return bits

    def _found(self, place: int, what: str) -> None:
        self.damaged.append(f"{what}; block {place} will be done again")

    def finished(self, place: int) -> bool:
        if place not in self._whole:
            return False
        before = self._entries.get(place - 1)
        return self._entries[place].after == (before.sha256 if before else "")

    @property
    def done(self) -> int:
        """Blocks that need not be done again."""
        return sum(map(self.finished, self._entries))

    def restore(self, place: int, block: nn.Module) -> tuple[FinishedBlock, Mapping[str, Tensor]]:
        frozen = self._frozen(place, self._tensors(place))
        return self.summary(place), frozen.parameters(next(block.parameters()).dtype)

    def summary(self, place: int) -> FinishedBlock:
        entry = self._entries[place]
        # Copied: what safetensors reads is mapped from the file, which would keep the run folder from being removed.
        tensors = {name: tensor.clone() for name, tensor in self._tensors(place, *_FINISHED).items()}
        return FinishedBlock.of(tensors, entry.record, entry.flat_inputs, entry.added_biases)

    @timed("write")
    def block_done(self, place: int, path: str, block: nn.Module, finished: FinishedBlock, frozen: FrozenBlock) -> None:
        tensors = tensors_of(frozen) | finished.tensors()
        tensors |= {f"buffer:{name}": tensor for name, tensor in buffers_of(block, self._storage_dtype).items()}
        file = self._file(place, "safetensors")
        # Linears that runtimes fuse share a scale, and a file holds no tensor twice.
        apart = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        write_tensors(file, apart)
        before = self._entries.get(place - 1)
        self._entries[place] = BlockEntry(
            path=path,
            bytes=file.stat().st_size,
            sha256=checksum(file),
            after=before.sha256 if before else "",
            flat_inputs=list(finished.flat_inputs),
            added_biases=list(finished.added_biases),
            record=finished.record,
        )
        write_entry(self._file(place, "json"), self._entries[place])
        self._whole.add(place)

    def frozen_blocks(self) -> Iterator[tuple[str, FrozenBlock, dict[str, Tensor]]]:
        """Every block in turn: its path, its frozen parameters, and what it holds besides parameters.

        Raises:
            LrquantError: a block was damaged since it was written or last read.
        """
        for place, entry in sorted(self._entries.items()):
            if checksum(self._file(place, "safetensors")) != entry.sha256:
                file = self._file(place, "safetensors")
                raise LrquantError(f"{file}: damaged since it was written; run the same command again")
            tensors = self._tensors(place)
            buffers = {name.removeprefix("buffer:"): tensors[name] for name in tensors if name.startswith("buffer:")}
            yield entry.path, self._frozen(place, tensors), buffers

    def _frozen(self, place: int, tensors: Mapping[str, Tensor]) -> FrozenBlock:
        return frozen_block(tensors, self._scheme.within(self._entries[place].path), self._storage_dtype)

    def _file(self, place: int, kind: str) -> Path:
        return self.folder / f"{place:05}.{kind}"

    def _tensors(self, place: int, *kinds: str) -> dict[str, Tensor]:
        """The tensors in a block's file; of `kinds` alone, where any are named."""
        try:
            with safe_open(self._file(place, "safetensors"), framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(kinds or "")]  # noqa: SIM118
                return {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise LrquantError(f"{self._file(place, 'safetensors')}: cannot be read ({error})") from error
