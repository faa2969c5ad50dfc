"""Atomic, durable writing of files, and checksums.

A file is written under a temporary name and synced to disk before it gets its final name; then the folder, which holds
the name, is synced too. So a file is complete or absent even if the process or the machine fails.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lrquant.errors import LrquantError
from lrquant.runtime.paths import permit, reason

SUMS_FILE = "SHA256SUMS"  # as sha256sum writes and reads it
_PIECE = 1 << 20


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Force everything below `folder` to the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def write_durably(path: Path, write: Callable[[Path], object]) -> None:
    """Make `path` by `write(temporary name)`.

    Raises:
        LrquantError: the disk is full, a quota is used up, the place is read-only. What was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError | SafetensorError):
            raise LrquantError(f"{path}: cannot be written ({reason(error)})") from error
        raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file. One entry of metadata: more would be written in no fixed order."""

    def write(temporary: Path) -> None:
        save_file(dict(tensors), temporary, {"format": "pt"})
        permit(temporary)

    write_durably(path, write)


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def write_sums(folder: Path) -> None:
    """Note the checksums of the weight files in `folder`, for `check_sums` and for `sha256sum --check`."""
    lines = [f"{checksum(path)}  {path.name}\n" for path in sorted(folder.glob("*.safetensors"))]
    (folder / SUMS_FILE).write_text("".join(lines))


def check_sums(folder: Path) -> None:
    """Raise unless the weight files in `folder` are what its checksums say; files without a checksum pass.

    Raises:
        LrquantError: a file is damaged.
    """
    try:
        lines = (folder / SUMS_FILE).read_text().splitlines()
    except (OSError, ValueError):
        return
    noted = {name: sum for sum, _, name in (line.partition("  ") for line in lines)}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name in noted and noted[path.name] != checksum(path):
            raise LrquantError(
                f"{path}: damaged (its checksum is not the one in {SUMS_FILE}); fetch it again, or quantize again"
            )
