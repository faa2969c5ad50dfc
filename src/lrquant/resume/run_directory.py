"""Where a run lives until its checkpoint is whole: a hidden folder beside the save directory.

    .NAME.lrquant/
      lock            held by the process that works here, and lrquant's mark (lock.py)
      run.json        what this is a run of (identity.py)
      00012.*         finished blocks (journal.py)
      checkpoint/     the result while it is written
      placing.json    its files' checksums, just before it is put in its place

The result gets its name by one rename, so the save directory holds a whole checkpoint or none. A run that ends in
an error leaves this folder if any block is finished, and the same command goes on from it; else it leaves nothing.
Only a folder with lrquant's own mark is ever touched, and links are not followed.

A save directory that cannot be renamed over, because it is a mount point (a container's volume) or its parent is
read-only, has this folder inside, and gets the files one by one: `config.json`, without which they are no model, last.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from lrquant.errors import Interrupted, LrquantError, UsageError
from lrquant.resume.fingerprint import difference
from lrquant.resume.lock import LOCK, STILL_OPEN, Busy, is_marked, locked
from lrquant.resume.manifest import Placing, RunEntry, read_entry, write_entry
from lrquant.runtime.files import checksum, reason, sync, sync_tree

_RUN, _PLACING, _RESULT = "run.json", "placing.json", "checkpoint"
_BESIDE = ".lrquant"  # behind a dot and the save directory's name
_INSIDE = ".lrquant"  # the run folder of a save directory that must stay where it is


class RunDirectory:
    """The folder of one run, locked by this process."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = run_folder(target)
        self._identity: dict[str, str] = {}

    def claim(self, identity: dict[str, str]) -> None:
        """Take the folder for a run of `identity`.

        Raises:
            UsageError: what is there is an unfinished run of something else.
        """
        self._identity = identity
        try:
            before = self._claimed()
        except LrquantError as error:
            raise UsageError(
                f"{error}: the state of this unfinished run cannot be read; start over with --restart"
            ) from None
        if before is None:
            self.clear()
            write_entry(self.folder / _RUN, RunEntry(layout=2, identity=identity))
            return
        changed = difference(before, identity)
        if changed:
            raise UsageError(
                f"{self.target}: an unfinished run is kept there, but {changed}; "
                f"repeat its original command, or start over with --restart"
            )

    def _claimed(self) -> dict[str, str] | None:
        """The identity of the run that is here; None: there is none."""
        try:
            return read_entry(self.folder / _RUN, RunEntry).identity
        except FileNotFoundError:  # it may have been killed while it tidied up
            return read_entry(self.folder / _PLACING, Placing).identity if self.is_placed() else None

    def clear(self) -> None:
        """Forget everything but the lock."""
        for path in self.folder.iterdir():
            if path.name != LOCK and not path.name.startswith(STILL_OPEN):
                _remove(path)

    def tidy_up(self) -> None:
        """Remove the folder; what says that all is done and whose it is goes last: a kill in between changes nothing.

        On NFS a file that is still open stays as `.nfs…` until it is closed, and so does the folder.
        """
        last = (_PLACING, LOCK)
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name in last and 1 + last.index(path.name)):
            if not path.name.startswith(STILL_OPEN):
                _remove(path)
        with suppress(OSError):
            self.folder.rmdir()

    def finished_blocks(self) -> int:
        return len(list(self.folder.glob("[0-9]*.json")))

    def is_placed(self) -> bool:
        """Whether the target is this run's whole checkpoint: the process ended just before it could tidy up."""
        try:
            files = read_entry(self.folder / _PLACING, Placing).files
            return files == _checksums(self.target)
        except (OSError, LrquantError):
            return False

    def place(self, write: Callable[[Path], object]) -> None:
        """Let `write` fill a folder, and make it the target.

        Raises:
            LrquantError: the disk is full, or the target cannot be written.
        """
        result = self.folder / _RESULT
        try:
            if result.is_symlink() or result.exists():
                _remove(result)
            result.mkdir()
            write(result)
            sync_tree(result)
            write_entry(self.folder / _PLACING, Placing(files=_checksums(result), identity=self._identity))
            if self.folder.parent == self.target:
                for path in sorted(result.iterdir(), key=lambda path: path.name == "config.json"):
                    os.replace(path, self.target / path.name)
                sync(self.target)
            else:
                os.replace(result, self.target)
                sync(self.target.parent)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                shutil.rmtree(result)  # makes room
            raise LrquantError(f"{self.target}: cannot be written ({reason(error)})") from error


def run_folder(target: Path) -> Path:
    """The folder for the unfinished run of `target`: beside it, or inside it if it is a mount point."""
    target = resolved(target)
    if target.is_dir() and (os.path.ismount(target) or not os.access(target.parent, os.W_OK)):
        return target / _INSIDE
    return target.parent / f".{target.name}{_BESIDE}"


def resolved(target: str | Path) -> Path:
    """The folder that `target` leads to; the folder need not be there."""
    return Path(os.path.realpath(target))


def _remove(path: Path) -> None:
    """Delete a file, a link (not what it leads to) or a folder."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _checksums(folder: Path) -> dict[str, str]:
    """Of a result's files; a run folder inside it is none of them."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    names = {path: path.relative_to(folder) for path in files}
    return {str(names[path]): checksum(path) for path in files if names[path].parts[0] != _INSIDE}


@contextmanager
def run_directory(save_dir: str | Path, restart: bool = False) -> Iterator[RunDirectory]:
    """Hold the run folder of `save_dir`; it goes when the block ends well.

    Raises:
        UsageError: `save_dir` is taken, cannot be made, or another process works on it.
        Interrupted: the run was interrupted; the line says what is kept.
    """
    target = resolved(save_dir)
    run = RunDirectory(target)
    check_place(target, run.folder)
    made = [parent for parent in (run.folder, *run.folder.parents) if not parent.exists()]
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        with locked(run.folder / LOCK, str(target)):
            if restart:
                run.clear()
            if _occupied(target) and not run.is_placed():
                raise _not_empty(target)
            yield run
            run.tidy_up()
    except BaseException as error:
        kept = run.finished_blocks()
        if not kept and not isinstance(error, Busy):
            shutil.rmtree(run.folder, ignore_errors=True)
            for parent in made[1:]:
                with suppress(OSError):
                    parent.rmdir()
        blocks = f"{kept} finished block{'s are' if kept != 1 else ' is'} kept; the same command resumes there"
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(
                f"{str(error) or 'interrupted'}; {blocks if kept else 'nothing was left behind'}"
            ) from error
        if isinstance(error, UsageError):
            raise
        if isinstance(error, LrquantError):
            raise LrquantError(f"{error}; {blocks if kept else 'nothing was left behind'}") from error
        if isinstance(error, OSError) and error.strerror:
            where = f"{target}: cannot be written ({error.strerror})"
            if not kept:
                raise UsageError(where) from error
            raise LrquantError(f"{where}; {blocks}") from error
        raise


def check_place(target: Path, folder: Path) -> None:
    """Raise where `target` cannot become a result that is made in `folder`.

    Raises:
        UsageError: it is a file, holds something, has a name that is too long; or `folder` is a stranger's.
    """
    longest = os.pathconf("/", "PC_NAME_MAX")
    if len(os.fsencode(folder.name)) > longest:
        raise UsageError(f"{target}: cannot be written (the name is longer than {longest - len(_BESIDE)} bytes)")
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target}: the save directory is a file; choose another")
    if os.path.lexists(folder) and not is_marked(folder):
        raise UsageError(f"{folder}: lrquant needs a folder of this name, but did not create this one; move it away")
    if _occupied(target) and not folder.is_dir():
        raise _not_empty(target)


def _occupied(target: Path) -> bool:
    return target.is_dir() and any(path.name != _INSIDE for path in target.iterdir())


def _not_empty(target: Path) -> UsageError:
    return UsageError(f"{target}: the save directory is not empty; choose another or empty it")
