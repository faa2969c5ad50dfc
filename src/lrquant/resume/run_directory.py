"""Where a run lives until its checkpoint is whole: a hidden folder beside the save directory.

    .NAME.lrquant/
      lock            held by the process that works here (lock.py)
      run.json        what this is a run of (identity.py)
      00012.*         finished blocks (journal.py)
      checkpoint/     the result while it is written
      placing.json    its files' checksums, just before it is put in its place

The result gets its name by one rename, so the save directory holds a whole checkpoint or none. A run that ends in
an error leaves this folder if any block is finished, and the same command goes on from it; else it leaves nothing.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from lrquant.errors import Interrupted, LrquantError, UsageError
from lrquant.resume.fingerprint import difference
from lrquant.resume.lock import Busy, locked
from lrquant.resume.manifest import Placing, RunEntry, read_entry, write_entry
from lrquant.runtime.files import checksum, reason, sync, sync_tree

_LOCK, _RUN, _PLACING, _RESULT = "lock", "run.json", "placing.json", "checkpoint"
_STILL_OPEN = ".nfs"


class RunDirectory:
    """The folder of one run, locked by this process."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = run_folder(target)

    def claim(self, identity: dict[str, str]) -> None:
        """Take the folder for a run of `identity`.

        Raises:
            UsageError: what is there is an unfinished run of something else.
        """
        file = self.folder / _RUN
        try:
            before = read_entry(file, RunEntry).identity
        except FileNotFoundError:
            self.clear()
            write_entry(file, RunEntry(layout=1, identity=identity))
            return
        except LrquantError as error:
            raise UsageError(f"{error}: whose run this is cannot be told; begin anew with --restart") from None
        changed = difference(before, identity)
        if changed:
            raise UsageError(
                f"{self.target}: an unfinished run is kept there, and {changed}; "
                f"run it as it was begun, or begin anew with --restart"
            )

    def clear(self) -> None:
        """Forget everything but the lock."""
        for path in self.folder.iterdir():
            if path.name != _LOCK and not path.name.startswith(_STILL_OPEN):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def tidy_up(self) -> None:
        """Remove the folder; what says that all is done goes last, so that a kill in between changes nothing.

        On NFS a file that is still open stays as `.nfs…` until it is closed, and so does the folder.
        """
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == _PLACING):
            if not path.name.startswith(_STILL_OPEN):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
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
            if result.exists():
                shutil.rmtree(result)
            result.mkdir()
            write(result)
            sync_tree(result)
            write_entry(self.folder / _PLACING, Placing(files=_checksums(result)))
            os.replace(result, self.target)
            sync(self.target.absolute().parent)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                shutil.rmtree(result)  # makes room
            raise LrquantError(f"{self.target}: cannot be written ({reason(error)})") from error


def run_folder(target: Path) -> Path:
    return target.absolute().parent / f".{target.absolute().name}.lrquant"


def check_target(target: Path) -> None:
    """Raise where no run can leave its result.

    Raises:
        UsageError: `target` is a file, or holds something else than the result of a run that is being tidied up.
    """
    if target.is_file():
        raise UsageError(f"{target}: the save directory is a file; name another")
    if _occupied(target) and not run_folder(target).is_dir():
        raise _not_empty(target)


def _checksums(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): checksum(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def run_directory(save_dir: str | Path, restart: bool = False) -> Iterator[RunDirectory]:
    """Hold the run folder of `save_dir`; it goes when the block ends well.

    Raises:
        UsageError: `save_dir` is taken, cannot be made, or another process works on it.
        Interrupted: the run was interrupted; the line says what is kept.
    """
    target = Path(save_dir)
    run = RunDirectory(target)
    check_target(target)
    made = [parent for parent in (run.folder, *run.folder.parents) if not parent.exists()]
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        with locked(run.folder / _LOCK, str(target)):
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
        blocks = f"{kept} finished block{'s are' if kept != 1 else ' is'} kept: the same command goes on from there"
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"interrupted; {blocks if kept else 'nothing was left behind'}") from error
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


def _occupied(target: Path) -> bool:
    return target.is_dir() and any(target.iterdir())


def _not_empty(target: Path) -> UsageError:
    return UsageError(f"{target}: the save directory is not empty; name another or empty it")
