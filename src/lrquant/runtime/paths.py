"""Files named by users: read only if they are regular and not too large, and written through links and into devices.

A device, a FIFO or a link is never replaced by a file, and endless files are not read. Imports nothing heavy.
"""

import errno
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from lrquant.errors import UsageError


def permit(path: Path, mode: int = 0o666) -> None:
    """Give a file the permissions that the umask leaves: safetensors makes files for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(mode & ~umask)


def read_regular(path: Path, most: int, follow: bool = True) -> bytes:
    """The bytes of a regular file of at most `most` bytes; a device or a FIFO would never end.

    Raises:
        ValueError: it is something else, or larger.
        OSError: it cannot be read; or it is a symbolic link, and `follow` is false.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file")
        if found.st_size > most:
            raise ValueError(f"larger than {most} bytes")
        return file.read(most)


def is_stream(path: Path) -> bool:
    """Whether `path` is a device, a FIFO or a process's own output: to be written as it is, never replaced."""
    resolved = os.path.realpath(path)
    return (path.exists() and not path.is_file()) or (resolved.startswith(("/dev/", "/proc/")) and path.exists())


def check_writable(path: Path, option: str) -> None:
    """Raise before any work is done if the file `path`, given by `option`, could not be written at the end.

    Raises:
        UsageError: it is a folder, or cannot be made.
    """
    try:
        if path.is_dir():
            raise UsageError(f"{option} {path}: this is a folder")
        if is_stream(path):
            if not os.access(path, os.W_OK):
                raise OSError(errno.EACCES, "Permission denied")
            return
        folder = Path(os.path.realpath(path)).parent
        if not folder.is_dir():
            raise UsageError(f"{option} {path}: its folder does not exist")
        handle, name = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.part")  # the name must not be too long
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be written ({reason(error)})") from None


def write_file(path: Path, content: bytes) -> None:
    """Write `content` to the file that `path` leads to, whole or not at all; to a device or a FIFO, as it is.

    Raises:
        OSError: it cannot be written.
    """
    if is_stream(path):
        with path.open("wb") as stream:
            stream.write(content)
        return
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.part")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, target)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def reason(error: BaseException) -> str:
    """Why a file could not be read or written, in the system's words; safetensors wraps them."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).splitlines()
    return lines[0].rpartition(": ")[2].partition(" (os error")[0] if lines else type(error).__name__


def public_name(name: str) -> str:
    """The name of a model, text or file in published output, which never contains an absolute path.

    A path below the working folder is given relative to it, any other by its last part; all other names stay.
    """
    path = Path(name)
    if not path.is_absolute():
        return name
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return path.name or name
