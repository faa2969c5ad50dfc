"""Safetensors files of limited size, written one by one, so that a checkpoint is never completely in memory."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lrquant.runtime.paths import permit

MOST_BYTES = 256 << 20  # of one file, unless what is added at once is larger


class ShardWriter:
    """Writes what is added to `folder`, under the names that transformers gives to shards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._waiting: dict[str, Tensor] = {}
        self._names: list[list[str]] = []  # of the tensors in each file that is written
        self._total = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        waiting = sum(tensor.nbytes for tensor in self._waiting.values())
        if self._waiting and waiting + sum(tensor.nbytes for tensor in tensors.values()) > MOST_BYTES:
            self._flush()
        self._waiting |= tensors

    def finish(self) -> int:
        """Write the rest, give files their names, and write the index; returns the bytes of all tensors."""
        if self._waiting or not self._names:
            self._flush()
        count = len(self._names)
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._names):
            name = "model.safetensors" if count == 1 else f"model-{index + 1:05}-of-{count:05}.safetensors"
            self._part(index).rename(self.folder / name)
            weight_map |= dict.fromkeys(names, name)
        if count > 1:
            index_file = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            text = json.dumps(index_file, indent=2, sort_keys=True) + "\n"
            (self.folder / "model.safetensors.index.json").write_text(text)
        return self._total

    def _flush(self) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in self._waiting.items()}
        save_file(tensors, self._part(len(self._names)), {"format": "pt"})
        permit(self._part(len(self._names)))
        self._names.append(list(tensors))
        self._total += sum(tensor.nbytes for tensor in tensors.values())
        self._waiting = {}

    def _part(self, index: int) -> Path:
        return self.folder / f"part-{index:05}"


def tensor_bytes(folder: Path) -> int:
    """Bytes of all tensors in the safetensors files of `folder`: the files without their headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            total += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    return total
