"""The journal: finished blocks of an unfinished run, on disk.

    00012.safetensors   packed:NAME    the block's tensors as the checkpoint will hold them
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
from lrquant.export.compressed_tensors import (
    buffers_of,
    needs_whole_weights,
    pack_block,
    quantized_size,
    unpack_block,
)
from lrquant.formats import Scheme
from lrquant.reconstruction.block_parameters import FrozenBlock
from lrquant.reconstruction.journal import FinishedBlock, Journal
from lrquant.resume.fingerprint import digest_of
from lrquant.resume.manifest import BitsEntry, BlockEntry, read_entry, write_entry
from lrquant.runtime.files import checksum, write_tensors
from lrquant.runtime.profile import timed

_KINDS = ("learned:", "carried:", "scale:", "absmax:", "midpoint:")  # of a finished block's tensors


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

    def restore(self, place: int, block: nn.Module) -> tuple[FinishedBlock, Mapping[str, Tensor]] | None:
        packed, whole = dict(self._read(place, "packed:")), needs_whole_weights(block, "")
        parameters = unpack_block(
            packed,
            self._scheme.within(self._entries[place].path),
            self._storage_dtype,
            next(block.parameters()).dtype,
            whole,
        )
        if digest_of(parameters) != self._entries[place].parameters:
            self._whole.discard(place)
            self._found(
                place, f"{self._file(place, 'safetensors')}: does not unpack to the packed values on this machine"
            )
            return None
        return self.summary(place), parameters

    def summary(self, place: int) -> FinishedBlock:
        entry = self._entries[place]
        # Copies: what is read is a view of its file, which would stay open while the run folder is taken away.
        tensors = {kind + name: tensor.clone() for kind in _KINDS for name, tensor in self._read(place, kind)}
        return FinishedBlock.of(tensors, entry.record, entry.flat_inputs, entry.added_biases)

    @timed("write")
    def block_done(self, place: int, path: str, block: nn.Module, finished: FinishedBlock, frozen: FrozenBlock) -> None:
        packed = pack_block(frozen, self._scheme.within(path), self._storage_dtype, needs_whole_weights(block, ""))
        tensors = {f"packed:{name}": tensor for name, tensor in packed.items()}
        tensors |= {f"buffer:{name}": tensor for name, tensor in buffers_of(block, self._storage_dtype).items()}
        tensors |= finished.tensors()
        file = self._file(place, "safetensors")
        # Linears that runtimes fuse share a scale, and a file holds no tensor twice.
        apart = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        write_tensors(file, apart)
        weights, bits = quantized_size(frozen.weights, packed)
        before = self._entries.get(place - 1)
        self._entries[place] = BlockEntry(
            path=path,
            bytes=file.stat().st_size,
            sha256=checksum(file),
            after=before.sha256 if before else "",
            parameters=digest_of(frozen.parameters(next(block.parameters()).dtype)),
            quantized_weights=weights,
            quantized_bits=bits,
            flat_inputs=list(finished.flat_inputs),
            added_biases=list(finished.added_biases),
            record=finished.record,
        )
        write_entry(self._file(place, "json"), self._entries[place])
        self._whole.add(place)

    def checkpoint_tensors(self) -> Iterator[dict[str, Tensor]]:
        """Every block's tensors under their full names, one block after the other.

        Raises:
            LrquantError: a block was damaged since it was written or read last.
        """
        for place, entry in sorted(self._entries.items()):
            if checksum(self._file(place, "safetensors")) != entry.sha256:
                raise LrquantError(
                    f"{self._file(place, 'safetensors')}: damaged since it was written; run the same command again"
                )
            tensors = dict(self._read(place, "buffer:")) | dict(self._read(place, "packed:"))
            yield {f"{entry.path}.{name}": tensor for name, tensor in tensors.items()}

    def quantized_size(self) -> tuple[int, int]:
        """(quantized weights, the bits that they, their scales and zero points take) over all blocks."""
        entries = self._entries.values()
        return sum(entry.quantized_weights for entry in entries), sum(entry.quantized_bits for entry in entries)

    def _file(self, place: int, kind: str) -> Path:
        return self.folder / f"{place:05}.{kind}"

    def _read(self, place: int, prefix: str) -> Iterator[tuple[str, Tensor]]:
        try:
            with safe_open(self._file(place, "safetensors"), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name.startswith(prefix):
                        yield name.removeprefix(prefix), file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise LrquantError(f"{self._file(place, 'safetensors')}: cannot be read ({error})") from error
