"""Files of channel statistics, so that a later run does not have to collect them."""

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lrquant.errors import LrquantError, UsageError
from lrquant.runtime.paths import reason, write_file
from lrquant.transforms.statistics import ChannelStatistics

Statistics = Sequence[dict[str, ChannelStatistics]]


def save_statistics_file(path: Path, statistics: Statistics, kinds: Sequence[str] = ("absmax", "midpoint")) -> None:
    """One safetensors file; tensors are called `block.linear:absmax` and `block.linear:midpoint`."""
    tensors = {
        f"{index}.{linear}:{kind}": tensor.contiguous()
        for index, block in enumerate(statistics)
        for linear, seen in block.items()
        for kind, tensor in (("absmax", seen.absmax), ("midpoint", seen.midpoint))
        if tensor is not None and kind in kinds
    }
    try:
        write_file(path, save(tensors))
    except OSError as error:
        raise LrquantError(f"{path}: cannot be written ({reason(error)})") from None


def load_statistics(*paths: Path) -> Statistics:
    """Statistics written by `save_statistics_file`; maxima and midpoints may lie in files of their own.

    Raises:
        UsageError: no such file, or not one of these.
    """
    path = paths[0]
    try:
        tensors: dict[str, Tensor] = {}
        for path in paths:
            tensors |= load_file(path)
        blocks: dict[int, dict[str, ChannelStatistics]] = {}
        for name, tensor in tensors.items():
            block, _, rest = name.partition(".")
            linear, _, kind = rest.rpartition(":")
            if kind not in ("absmax", "midpoint"):
                raise ValueError(f"tensor {name!r}")
            setattr(blocks.setdefault(int(block), {}).setdefault(linear, ChannelStatistics()), kind, tensor)
        if any(None in (seen.absmax, seen.midpoint) for block in blocks.values() for seen in block.values()):
            raise ValueError("it holds only maxima or only midpoints: give both files")
        return [blocks[index] for index in range(len(blocks))]
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UsageError(f"{path}: not a file of channel statistics ({str(error).splitlines()[0]})") from None
