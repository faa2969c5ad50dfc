"""A lock that lets one run at a time use a folder; the system releases it when the process dies.

The lock file also marks folders that lrquant created, by its first word.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lrquant.errors import UsageError

LOCK = "lock"
STILL_OPEN = ".nfs"  # how NFS calls a file that was deleted and is still open
MARK = b"lrquant "  # before the number of the process


class Busy(UsageError):
    """Another process uses the folder, so nothing in it may be changed."""


@contextmanager
def locked(path: Path, name: str) -> Iterator[None]:
    """Hold the lock file `path`, making it if need be. `name` is what the error calls the folder.

    Raises:
        Busy: another process holds it.
    """
    while True:
        handle = _opened(path)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(handle, 40).removeprefix(MARK).decode(errors="replace").strip()
            os.close(handle)
            raise Busy(
                f"{name}: another run{f' (process {owner})' if owner else ''} is writing there; "
                f"wait until it ends, or choose another directory"
            ) from None
        if os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path)):
            break
        os.close(handle)  # the run before us ended in between and took the file away
    try:
        os.truncate(handle, 0)
        os.pwrite(handle, MARK + f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def _opened(path: Path) -> int:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UsageError(f"{path}: a symbolic link that lrquant did not create; remove it") from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UsageError(f"{path}: not a regular file, and not created by lrquant; remove it")
    return handle


def is_marked(folder: Path) -> bool:
    """Whether lrquant made `folder`: a real folder that holds nothing yet, or a lock file with its mark.

    A process that is killed before it has written the mark leaves an empty lock file and nothing else.
    """
    if folder.is_symlink() or not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir() if not path.name.startswith(STILL_OPEN)}
    lock = folder / LOCK
    if not names or lock.is_symlink() or not lock.is_file():
        return not names
    with lock.open("rb") as file:
        mark = file.read(len(MARK))
    return mark == MARK or (mark == b"" and names == {LOCK})
