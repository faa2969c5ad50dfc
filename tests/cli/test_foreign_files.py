"""Files that are not ours: devices, FIFOs, links and strangers' folders are as they were, whatever a run does."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lrquant as lrquant_package
from lrquant.resume.run_directory import run_folder
from tests.cli.run import ENVIRONMENT, lrquant, started
from tests.tiny import write_tiny

QUICK = ["--method", "rtn", "--calib", "zoo:pydoc", "--nsamples", "2", "--seqlen", "32", "--no-report"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def quantize(tiny: Path, out: Path, *more: object) -> list[object]:
    return ["quantize", tiny, *QUICK, "--save-dir", out, *more]


def test_figures_go_through_links_and_into_fifos(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "figures.json").write_text("{}")
    (tmp_path / "link.json").symlink_to(tmp_path / "real" / "figures.json")
    os.mkfifo(tmp_path / "fifo")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "fifo").read_text()), daemon=True)
    reader.start()
    for name in ("link.json", "fifo"):
        done = lrquant(*quantize(tiny, tmp_path / f"out-{name}", "--json", tmp_path / name))
        assert done.returncode == 0, done.stderr
    reader.join(timeout=10)
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real" / "figures.json").read_text())["format"] == "W4A4"
    assert json.loads(read[0])["format"] == "W4A4"
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


def test_a_full_device_costs_neither_the_checkpoint_nor_the_figures(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = lrquant(*quantize(tiny, out, "--json", "/dev/full", "--save-statistics", "/dev/full"))
    assert done.returncode == 1
    assert "--json /dev/full: cannot be written (No space left on device)" in done.stderr
    assert '"bits_per_weight"' in done.stdout
    assert (out / "model.safetensors").is_file()
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_the_umask_decides_for_every_file(tiny: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert lrquant(*quantize(tiny, tmp_path / "out")[:-3], "--save-dir", tmp_path / "out").returncode == 0
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(modes.values()) == {"0o640"}, modes


def strangers_file(folder: Path) -> None:
    folder.mkdir()
    (folder / "precious").write_text("mine")


def strangers_lock(folder: Path) -> None:
    strangers_file(folder)
    (folder / "lock").write_text("mine")


def link_to_a_folder(folder: Path) -> None:
    strangers_file(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


def linked_lock(folder: Path) -> None:
    folder.mkdir()
    folder.with_name("elsewhere").write_text("mine")
    (folder / "lock").symlink_to(folder.with_name("elsewhere"))


def a_fifo(folder: Path) -> None:
    os.mkfifo(folder)


@pytest.mark.parametrize("make", [strangers_file, strangers_lock, link_to_a_folder, linked_lock, a_fifo])
@pytest.mark.parametrize("restart", [False, True])
def test_a_strangers_run_folder_is_left_alone(
    make: Callable[[Path], None], restart: bool, tiny: Path, tmp_path: Path
) -> None:
    make(run_folder(tmp_path / "out"))

    def seen() -> list[object]:
        files = sorted(tmp_path.rglob("*"))
        return [(path, path.lstat().st_mode, path.read_text() if path.is_file() else "") for path in files]

    before = seen()
    done = lrquant(*quantize(tiny, tmp_path / "out", *(["--restart"] if restart else [])))
    assert done.returncode == 2, done.stderr
    assert "did not create this one; move it away" in done.stderr
    assert seen() == before


def test_a_link_in_our_own_folder_is_removed_and_not_followed(tiny: Path, tmp_path: Path) -> None:
    strangers_file(tmp_path / "elsewhere")
    ours = run_folder(tmp_path / "out")
    ours.mkdir()
    (ours / "lock").write_text("lrquant 1\n")
    (ours / "checkpoint").symlink_to(tmp_path / "elsewhere")
    assert lrquant(*quantize(tiny, tmp_path / "out", "--restart")).returncode == 0
    assert (tmp_path / "elsewhere" / "precious").read_text() == "mine"


@pytest.mark.parametrize("kind", ["link", "dangling link"])
def test_a_save_directory_may_be_a_link(kind: str, tiny: Path, tmp_path: Path) -> None:
    if kind == "link":
        (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    done = lrquant(*quantize(tiny, tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "real"]


def test_a_mount_point_gets_the_files_moved_into_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == volume)
    number = volume.stat().st_ino
    done = lrquant(*quantize(tiny, volume))
    assert done.returncode == 0, done.stderr
    assert lrquant(*quantize(tiny, tmp_path / "beside")).returncode == 0
    assert volume.stat().st_ino == number
    names = sorted(path.name for path in (tmp_path / "beside").iterdir())
    assert sorted(path.name for path in volume.iterdir()) == names
    assert lrquant(*quantize(tiny, volume)).returncode == 2


def test_sigterm_ends_in_one_line(tiny: Path, tmp_path: Path) -> None:
    """Schedulers send it; Control-C has its test among those of interrupted runs."""
    slow = ["--epochs", 10_000, "--kernels", "eager", "--method", "lrquant"]
    process = started(*quantize(tiny, tmp_path / "out", *slow))
    while not run_folder(tmp_path / "out").is_dir() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(1)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert "terminated; nothing was left behind" in said
    assert "Traceback" not in said
    assert not run_folder(tmp_path / "out").exists()


def test_a_second_control_c_ends_without_a_traceback() -> None:
    code = (
        "import signal, os, time\nfrom lrquant.cli.main import run\n"
        "def work():\n    try:\n        os.kill(os.getpid(), signal.SIGINT)\n        time.sleep(9)\n"
        "    finally:\n        os.kill(os.getpid(), signal.SIGINT)\n        time.sleep(9)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\nrun(work)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGINT
    assert done.stderr == ""


def test_control_c_while_an_object_is_finalized_is_not_lost() -> None:
    code = (
        "import signal, os, time\nfrom lrquant.cli.main import run\n"
        "class Finalized:\n    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n        time.sleep(0.2)\n"
        "def work():\n    Finalized()\n    time.sleep(20)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\nrun(work)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stderr.strip() == "Error: interrupted"


def test_surroundings_that_are_gone(tmp_path: Path) -> None:
    """A deleted working folder is one line; without a standard output results go nowhere."""
    command = f'{sys.executable} -P -c "from lrquant.cli.main import main; main()" doctor'
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(Path(lrquant_package.__file__).parents[1])}
    shell = {
        "gone": f"mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone; {command}",
        "closed": f"{command} >&-",
    }
    done = {
        name: subprocess.run(["sh", "-c", line], capture_output=True, text=True, env=environment)
        for name, line in shell.items()
    }
    assert done["gone"].returncode == 2
    assert done["gone"].stderr.strip() == "Error: the working folder was deleted; change to one that exists"
    assert "Traceback" not in done["closed"].stderr
    assert done["closed"].returncode in (0, 1)


def test_no_absolute_path_leaves_the_machine(tiny: Path, tmp_path: Path) -> None:
    """Cards, recipes and reports are published; where a model or a text lay on this machine is nobody's business."""
    (tmp_path / "secret-folder").mkdir()
    text = tmp_path / "secret-folder" / "text.txt"
    text.write_text(" ".join(map(str, range(900))))
    options = ["--calib", text, "--nsamples", 2, "--seqlen", 32, "--method", "rtn"]
    done = lrquant("quantize", tiny, *options, "--save-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "out").rglob("*"):
        if path.suffix in (".md", ".yaml", ".json", ".html"):
            assert str(tmp_path) not in path.read_text(), path
            assert str(tiny) not in path.read_text(), path
    assert "calibration: text.txt" in (tmp_path / "out" / "recipe.yaml").read_text()


def test_a_float32_model_is_compared_with_itself(tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path / "tiny", dtype=torch.float32)
    done = lrquant(*quantize(tiny, tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    ratio = float(done.stdout.partition(" times smaller than float32")[0].rpartition(" ")[2])
    before = (tiny / "model.safetensors").stat().st_size
    assert ratio == pytest.approx(before / (tmp_path / "out" / "model.safetensors").stat().st_size, rel=0.05)
