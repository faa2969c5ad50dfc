"""A run that is killed at any moment goes on, and ends in the same bytes as one that was left alone."""

import os
import pickle
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import lrquant
from lrquant import LrquantError, Recipe, UsageError
from lrquant.errors import Interrupted
from lrquant.export import shards
from lrquant.reconstruction import rounding as solving
from lrquant.reconstruction.callbacks import Callback
from lrquant.resume import run_directory
from lrquant.resume.run_directory import run_folder
from lrquant.runtime import files as durable
from tests.children import die_now, start, wait
from tests.cli.run import lrquant as lrquant_here
from tests.cli.run import started
from tests.tiny import SETTINGS, write_tiny

KILLS = 10  # by the clock, and as many at a write


IDS = [torch.arange(start, start + 48)[None] for start in (100, 900)]  # ready, because tokenizing takes the longest


def quantize(save_dir: Path) -> None:
    """The bundled model, quickly."""
    bundled = Recipe.preset("lrquant", wbits=4, abits=4, epochs=1, batch_size=2)
    lrquant.quantize("zoo:llama", bundled, calibration=IDS, save_dir=save_dir)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float, int]:
    """(the checkpoint's files, the seconds it took in a child, how many operations that make files last it took)."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    counted = Operations(10**9)
    with counted.watched():
        quantize(folder / "counted")
    began = time.perf_counter()
    assert wait(start(lambda: quantize(folder / "out"))) == 0
    seconds = time.perf_counter() - began
    assert contents(folder / "counted") == contents(folder / "out")
    return contents(folder / "out"), seconds, counted.seen


class Operations:
    """Counts writes, fsyncs and renames, and dies at one of them; a file that is being written is left half written."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.seen = 0

    def tick(self, path: object) -> None:
        self.seen += 1
        if self.seen == self.last:
            if isinstance(path, str | Path) and Path(path).is_file():
                os.truncate(path, Path(path).stat().st_size // 2)
            die_now()

    @contextmanager
    def watched(self) -> Iterator[None]:
        def after(real: Callable[..., None]) -> Callable[..., None]:
            def write(tensors: Any, path: Path, *rest: Any) -> None:
                real(tensors, path, *rest)
                self.tick(path)

            return write

        def before(real: Callable[..., Any]) -> Callable[..., Any]:
            def operation(*arguments: Any) -> Any:
                self.tick(None)
                return real(*arguments)

            return operation

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(durable, "save_file", after(durable.save_file))
            patch.setattr(shards, "save_file", after(shards.save_file))
            for name in ("fsync", "replace"):
                patch.setattr(os, name, before(getattr(os, name)))
            yield


def by_the_clock(seconds: float, chance: random.Random) -> Callable[[Path], int]:
    def kill(save_dir: Path) -> int:
        child = start(lambda: quantize(save_dir))
        time.sleep(chance.uniform(0.05, seconds))
        os.kill(child, signal.SIGKILL)
        return wait(child)

    return kill


def at_a_write(operations: int, chance: random.Random) -> Callable[[Path], int]:
    def kill(save_dir: Path) -> int:
        last = chance.randrange(1, operations)

        def work() -> None:
            with Operations(last).watched():
                quantize(save_dir)

        return wait(start(work))

    return kill


@pytest.mark.parametrize("kind", ["by the clock", "at a write"])
def test_killed_at_random_moments(
    kind: str, uninterrupted: tuple[dict[str, bytes], float, int], tmp_path: Path
) -> None:
    """Killed again and again until it is through; then anew, until it was killed often enough."""
    expected, seconds, operations = uninterrupted
    chance = random.Random(kind)
    kill = by_the_clock(seconds, chance) if kind == "by the clock" else at_a_write(operations, chance)
    killed = rounds = 0
    while killed < KILLS:
        rounds += 1
        save_dir = tmp_path / f"out{rounds}"
        for _ in range(4):
            code = kill(save_dir)
            assert code in (0, -9)
            killed += code == -9
            if save_dir.exists():
                break
        else:
            assert wait(start(lambda save_dir=save_dir: quantize(save_dir))) == 0
        assert contents(save_dir) == expected
        if run_folder(save_dir).exists():  # killed while it tidied up
            wait(start(lambda save_dir=save_dir: quantize(save_dir)))
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"out{n + 1}" for n in range(rounds))


@pytest.mark.parametrize("after", [1, 2, 7])
def test_killed_while_it_tidies_up(after: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever files are gone already: the same command finds its checkpoint, and another one is refused."""
    with monkeypatch.context() as patch:
        left = iter(range(after))
        real = run_directory._remove

        def remove(path: Path) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            real(path)

        patch.setattr(run_directory, "_remove", remove)
        order = lambda path: (path.name != "run.json", path.name)  # noqa: E731 - the folder's order is arbitrary
        patch.setattr(
            Path, "iterdir", lambda folder: iter(sorted((folder / name for name in os.listdir(folder)), key=order))
        )
        with pytest.raises(Interrupted):
            run(tiny, tmp_path / "out")
    expected = contents(tmp_path / "out")
    with pytest.raises(UsageError, match="an unfinished run is kept there"):
        run(tiny, tmp_path / "out", wbits=4)
    run(tiny, tmp_path / "out")
    assert contents(tmp_path / "out") == expected
    assert not run_folder(tmp_path / "out").exists()


def test_the_checkpoint_is_never_there_in_part(
    uninterrupted: tuple[dict[str, bytes], float, int], tmp_path: Path
) -> None:
    """Killed at the last operations, before and after the rename: the directory is missing or whole."""
    expected, _, operations = uninterrupted
    for left in (3, 2, 1, 0):
        save_dir = tmp_path / f"out{left}"

        def work(save_dir: Path = save_dir, last: int = operations - left) -> None:
            with Operations(last).watched():
                quantize(save_dir)

        assert wait(start(work)) == -9
        assert not save_dir.exists() or contents(save_dir) == expected
        if run_folder(save_dir).exists():
            quantize(save_dir)
        assert contents(save_dir) == expected
        assert not run_folder(save_dir).exists()


# From here on a tiny model.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"), num_hidden_layers=4)


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Seeds of the blocks that are learned, in order: with seed 0 these are their numbers."""
    seen: list[int] = []
    real = solving.learn

    def learn(*arguments: Any, seed: int, **more: Any) -> Any:
        seen.append(seed)
        return real(*arguments, seed=seed, **more)

    monkeypatch.setattr(solving, "learn", learn)
    return seen


def recipe(**changes: Any) -> Recipe:
    return Recipe.preset(**{"method": "lrquant", "wbits": 3, "abits": 4, **SETTINGS, **changes})


class Stops(Callback):
    """Ends a run after so many blocks."""

    def __init__(self, after: int, how: type[BaseException] = KeyboardInterrupt) -> None:
        self.left, self.how = after, how

    def block_done(self, record: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.how


class Dies(Callback):
    """Kills its process when a block is done."""

    def block_done(self, record: Any) -> None:
        die_now()


def run(tiny: Path, save_dir: Path, restart: bool = False, callback: Callback | None = None, **changes: Any) -> Any:
    """The same samples every time, tokenized."""
    return lrquant.quantize(
        str(tiny), recipe(**changes), calibration=IDS, save_dir=save_dir, restart=restart, callback=callback
    )


def interrupted(tiny: Path, save_dir: Path, after: int = 3, **changes: Any) -> str:
    """Leave a run with `after` finished blocks; returns what it said."""
    with pytest.raises(Interrupted) as stopped:
        run(tiny, save_dir, callback=Stops(after), **changes)
    return str(stopped.value)


def whole(tiny: Path, folder: Path, **changes: Any) -> dict[str, bytes]:
    run(tiny, folder, **changes)
    return contents(folder)


FORMATS: list[dict[str, Any]] = [
    {"wbits": 4, "abits": 4},
    {"wbits": 2, "abits": 16, "group_size": 32},
    {"wbits": 3, "abits": 8, "symmetric": True},
    {"wbits": 8, "abits": 8, "dtype": "bfloat16"},
    {"wbits": 8, "abits": 16, "shift": "on"},
    {"method": "lrquant+", "wbits": 4, "abits": 4},
    {"method": "lrquant+", "rotation_rank": 2},
    {"method": "smoothquant", "wbits": 16, "abits": 8},
    {"method": "rtn", "extra": ("head",)},
    {"rounding": "learned"},
    {"rounding": "gptq"},
    {"rotate": ("stream", "values")},
    {"wbits": 4, "abits": 4, "ignore": ("*.0.mlp",), "formats": {"*.o_proj": {"wbits": 8, "abits": 8}}},
    {"method": "lrquant-max", "rotate": ("stream", "values", "down"), "wbits": 4, "abits": 4},
]


@pytest.mark.parametrize("changes", FORMATS, ids=lambda changes: " ".join(map(str, changes.values())))
def test_every_format_goes_on_with_the_same_bytes(changes: dict[str, Any], tmp_path: Path, learned: list[int]) -> None:
    """Killed after its first block, interrupted after its second."""
    tiny = write_tiny(tmp_path / "tiny", num_hidden_layers=3, tie_word_embeddings="extra" not in changes)
    expected = whole(tiny, tmp_path / "whole", **changes)
    assert wait(start(lambda: run(tiny, tmp_path / "out", callback=Dies(), **changes))) == -9
    learned.clear()
    said = interrupted(tiny, tmp_path / "out", after=2, **changes)
    assert learned == [1]
    assert said == "interrupted; 2 finished blocks are kept; the same command resumes there"
    learned.clear()
    quantized = run(tiny, tmp_path / "out", **changes)
    assert learned == [2]
    assert contents(tmp_path / "out") == expected
    assert [record.index for record in quantized.records] == [0, 1, 2]


def test_control_c_on_the_command_line_says_how_to_go_on(tiny: Path, tmp_path: Path) -> None:
    """A real signal to a real process: exit code 130, one line, and the same command goes on."""
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(900))))
    command = ["quantize", tiny, "--save-dir", tmp_path / "out", "--calib", tmp_path / "text.txt", "--no-report"]
    command += ["--nsamples", 4, "--seqlen", 32, "--batch-size", 2, "--epochs", 40, "--kernels", "eager"]
    process = started(*command)
    while not (run_folder(tmp_path / "out") / "00000.json").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert re.search(r"interrupted; [1-3] finished blocks? (is|are) kept; the same command resumes there", said)
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
    again = lrquant_here(*command)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not run_folder(tmp_path / "out").exists()


def test_an_interruption_before_the_first_block_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    class Early(Callback):
        def started(self, blocks: int, epochs: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="interrupted; nothing was left behind"):
        run(tiny, tmp_path / "a" / "out", callback=Early())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"wbits": 4}, "wbits was 3 and is now 4"),
        ({"epochs": 2}, "epochs was 1 and is now 2"),
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"dtype": "bfloat16"}, 'dtype was "auto" and is now "bfloat16"'),
    ],
)
def test_another_recipe_is_refused_by_name(changes: dict[str, Any], named: str, tiny: Path, tmp_path: Path) -> None:
    interrupted(tiny, tmp_path / "out")
    with pytest.raises(UsageError, match=re.escape(named)) as refused:
        run(tiny, tmp_path / "out", **changes)
    assert "--restart" in str(refused.value)
    again = run(tiny, tmp_path / "out", restart=True, **changes)
    assert all(getattr(again.recipe, name) == value for name, value in changes.items())


def test_another_model_or_other_samples_are_refused(tiny: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    interrupted(model, tmp_path / "out")
    with pytest.raises(UsageError, match="the calibration samples changed"):
        lrquant.quantize(str(model), recipe(), calibration=[ids + 1 for ids in IDS], save_dir=tmp_path / "out")
    flip(model / "model.safetensors", 0.9)
    with pytest.raises(UsageError, match="the model changed"):
        run(model, tmp_path / "out")


def flip(path: Path, place: float = 0.7) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 4
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a flipped bit in the weights": lambda run: flip(run / "00001.safetensors"),
    "a flipped bit in the header": lambda run: flip(run / "00001.safetensors", 0.01),
    "a truncated block": lambda run: os.truncate(run / "00001.safetensors", 1000),
    "a missing block": lambda run: (run / "00001.safetensors").unlink(),
    "a flipped bit in the entry": lambda run: flip(run / "00001.json"),
    "an empty entry": lambda run: (run / "00001.json").write_text(""),
    "another block's entry": lambda run: (run / "00001.json").write_bytes((run / "00000.json").read_bytes()),
    "a pickle": lambda run: (run / "00001.safetensors").write_bytes(pickle.dumps(Bomb())),
}


class Bomb:
    """Goes off when it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path("/tmp/lrquant-was-here").touch, ())


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_only_that_block_is_redone(
    damage: str, tiny: Path, tmp_path: Path, learned: list[int]
) -> None:
    expected = whole(tiny, tmp_path / "whole")
    interrupted(tiny, tmp_path / "out")
    DAMAGE[damage](run_folder(tmp_path / "out"))
    learned.clear()
    quantized = run(tiny, tmp_path / "out")
    assert learned == [1, 3]  # the damaged one, and the one that was never done
    assert any("00001." in note and "block 1 will be done again" in note for note in quantized.notes)
    assert contents(tmp_path / "out") == expected


def test_a_block_that_comes_out_differently_takes_the_later_ones_with_it(
    tiny: Path, tmp_path: Path, learned: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another machine: what was learned on the old block's answers is not used."""
    interrupted(tiny, tmp_path / "out")
    (run_folder(tmp_path / "out") / "00001.json").unlink()
    here = solving.learn

    def elsewhere(forward: Any, start: Any, *rest: Any, **more: Any) -> Any:
        changed = {name: value * 1.5 if name.endswith(".scale") else value for name, value in start.items()}
        return here(forward, changed, *rest, **more)

    monkeypatch.setattr(solving, "learn", elsewhere)
    learned.clear()
    run(tiny, tmp_path / "out")
    assert learned == [1, 2, 3]


def test_a_run_whose_description_is_damaged_is_refused(tiny: Path, tmp_path: Path) -> None:
    interrupted(tiny, tmp_path / "out")
    flip(run_folder(tmp_path / "out") / "run.json")
    with pytest.raises(UsageError, match=r"run\.json: damaged .*--restart"):
        run(tiny, tmp_path / "out")
    run(tiny, tmp_path / "out", restart=True)


def test_a_second_run_is_refused_while_the_first_lives_and_not_after(tiny: Path, tmp_path: Path) -> None:
    save_dir = tmp_path / "out"
    reader, writer = os.pipe()

    class Waits(Callback):
        def block_done(self, record: Any) -> None:
            os.write(writer, b".")
            time.sleep(60)

    child = start(lambda: run(tiny, save_dir, callback=Waits()))
    os.read(reader, 1)
    with pytest.raises(UsageError, match=rf"another run \(process {child}\) is writing there"):
        run(tiny, save_dir)
    os.kill(child, signal.SIGKILL)
    wait(child)
    run(tiny, save_dir)
    assert contents(save_dir) == whole(tiny, tmp_path / "whole")


def test_files_that_are_still_open_on_nfs_do_not_fail_a_run(tiny: Path, tmp_path: Path) -> None:
    """NFS renames a file that is deleted while it is open, and keeps its folder; both go when it is closed."""

    class Opens(Callback):
        def block_done(self, record: Any) -> None:
            (run_folder(tmp_path / "out") / ".nfs0000000000000001").touch()

    run(tiny, tmp_path / "out", callback=Opens())
    assert contents(tmp_path / "out") == whole(tiny, tmp_path / "whole")
    assert [path.name for path in run_folder(tmp_path / "out").iterdir()] == [".nfs0000000000000001"]
    with pytest.raises(UsageError, match="is not empty"):
        run(tiny, tmp_path / "out")


@pytest.mark.parametrize("room", ["in a block", "in the checkpoint"])
def test_no_room_is_one_line_and_the_run_goes_on_when_there_is(room: str, tiny: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: blocks of this model take 40 kB, the checkpoint 900 kB."""
    (tmp_path / "precious").write_text("mine")
    reader, writer = os.pipe()

    def work() -> None:
        limit = 20_000 if room == "in a block" else 300_000
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            run(tiny, tmp_path / "out")
        except LrquantError as error:
            os.write(writer, str(error).encode())

    assert wait(start(work)) == 0
    said = os.read(reader, 10_000).decode()
    assert "cannot be written (File too large)" in said
    assert not (tmp_path / "out").exists()
    if room == "in a block":
        assert said.endswith("nothing was left behind")
        assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    else:
        assert said.endswith("4 finished blocks are kept; the same command resumes there")
    run(tiny, tmp_path / "out")
    assert contents(tmp_path / "out") == whole(tiny, tmp_path / "whole")
    assert (tmp_path / "precious").read_text() == "mine"
