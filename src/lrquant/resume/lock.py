"""One run at a time in a folder: a lock that the system takes back when its process dies."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lrquant.errors import UsageError


class Busy(UsageError):
    """Another process works here: nothing here is ours to change."""


@contextmanager
def locked(path: Path, name: str) -> Iterator[None]:
    """Hold the lock file `path`, making it if need be. `name` is what the error calls the folder.

    Raises:
        Busy: another process holds it.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(handle, 20).decode(errors="replace").strip()
            os.close(handle)
            raise Busy(
                f"{name}: another run{f' (process {owner})' if owner else ''} is writing there; "
                f"wait for it to end, or name another directory"
            ) from None
        if os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path)):
            break
        os.close(handle)  # the run before us ended in between and took the file away
    try:
        os.truncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(handle)
