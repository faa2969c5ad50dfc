"""Files that are there whole or not at all, whatever happens to the process or the machine, and their checksums.

A file is written under a temporary name, its bytes are forced to the disk, and only then it gets its name; then the
folder, which holds the name, is forced too.
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
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise LrquantError(f"{path}: cannot be written ({reason(error)})") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file. One entry of metadata: more would be written in no fixed order."""
    write_durably(path, lambda temporary: save_file(dict(tensors), temporary, {"format": "pt"}))


def reason(error: BaseException) -> str:
    """Why a file could not be written, in the system's words; safetensors wraps them."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).splitlines()[0]
    return text.rpartition(": ")[2].partition(" (os error")[0]


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
