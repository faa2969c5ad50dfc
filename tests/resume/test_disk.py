"""Disks that are full, over quota or read-only: one line, earlier output untouched, and the run goes on when it can.

Small file systems in memory stand for the disk; where the machine lets no one mount, only the limits are tested
(test_resume.py has one more, on the size of files).
"""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lrquant
from lrquant import LrquantError, UsageError
from lrquant.resume.run_directory import run_folder
from tests.resume.test_resume import IDS, contents, recipe, run
from tests.tiny import write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"), num_hidden_layers=4)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`mount(options)` mounts a file system in memory, or gives it other options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mounted(options: str) -> Path:
        again = "remount," if os.path.ismount(place) else ""
        command = ["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount here")
        if done.returncode != 0:
            pytest.skip(f"nothing may be mounted here ({done.stderr.strip()})")
        return place

    yield mounted
    if os.path.ismount(place):
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize(("size", "kept"), [("60k", 1), ("600k", 4)], ids=["in a block", "in the checkpoint"])
def test_a_full_disk(size: str, kept: int, mount: Callable[[str], Path], tiny: Path, tmp_path: Path) -> None:
    """Blocks of this model take some 40 kB, the checkpoint 900 kB."""
    disk = mount(f"size={size}")
    (disk / "precious").write_text("mine")
    with pytest.raises(LrquantError, match=r"cannot be written .No space left on device.") as failed:
        run(tiny, disk / "out")
    blocks = f"{kept} finished block{'s are' if kept > 1 else ' is'} kept; the same command resumes there"
    assert str(failed.value).endswith(blocks)
    assert "\n" not in str(failed.value)
    assert not (disk / "out").exists()
    assert (disk / "precious").read_text() == "mine"
    mount("size=8m")
    run(tiny, disk / "out")
    run(tiny, tmp_path / "elsewhere")
    assert contents(disk / "out") == contents(tmp_path / "elsewhere")
    assert sorted(path.name for path in disk.iterdir()) == ["out", "precious"]


def test_a_full_disk_before_the_first_block_leaves_nothing(mount: Callable[[str], Path], tiny: Path) -> None:
    disk = mount("size=16k")
    with pytest.raises(LrquantError, match=r"cannot be written .*No space left on device.*nothing was left behind"):
        run(tiny, disk / "out")
    assert list(disk.iterdir()) == []


def test_hidden_states_that_find_no_room(mount: Callable[[str], Path], tiny: Path) -> None:
    disk = mount("size=16k")
    with pytest.raises(LrquantError, match=r"the activation cache cannot be written .No space left on device.; free"):
        lrquant.quantize(str(tiny), recipe(), calibration=IDS, save_dir=disk / "out", activations="disk")
    assert list(disk.iterdir()) == []


def test_a_read_only_disk_is_refused_before_any_work(mount: Callable[[str], Path], tiny: Path) -> None:
    disk = mount("size=8m")
    (disk / "out").mkdir()
    mount("ro")
    with pytest.raises(UsageError, match=r"cannot be written .Read-only file system."):
        run(tiny, disk / "out")
    assert [path.name for path in disk.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", [errno.EDQUOT, errno.EROFS, errno.EIO], ids=os.strerror)
def test_a_disk_that_fails_on_the_way(kind: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quota is used up; a disk with errors becomes read-only, as Linux does it; a cable is pulled."""
    real, calls = os.fsync, 0

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 14:
            raise OSError(kind, os.strerror(kind))
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        line = rf"cannot be written \({os.strerror(kind)}\); [23] finished blocks are kept"
        with pytest.raises(LrquantError, match=line):
            run(tiny, tmp_path / "out")
    run(tiny, tmp_path / "out")
    run(tiny, tmp_path / "elsewhere")
    assert contents(tmp_path / "out") == contents(tmp_path / "elsewhere")
    assert not run_folder(tmp_path / "out").exists()
