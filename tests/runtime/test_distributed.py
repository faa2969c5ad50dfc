"""Several ranks do what one does: the same steps up to the order of sums; one that dies ends the run, which goes on."""

import functools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lrquant
from lrquant import LrquantError, Recipe, UsageError
from lrquant.losses import means, no_means
from lrquant.passes import mixed_precision as allocation
from lrquant.reconstruction import rounding as solving
from lrquant.reconstruction.block_optimizer import Batches, learn, shuffled
from lrquant.reconstruction.callbacks import Callback
from lrquant.resume.run_directory import run_folder
from lrquant.runtime.distributed import ALONE, LostRank, Ranks, check_batch, join
from tests.children import start, wait
from tests.cli.run import lrquant as lrquant_here
from tests.tiny import write_tiny

IDS = [torch.arange(first, first + 32)[None] for first in range(100, 900, 100)]  # eight samples


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def on_ranks(world: int, work: Callable[[Ranks], Any], folder: Path) -> list[Any]:
    """What `work` returns on each rank; JSON carries it."""
    port = free_port()

    def child(rank: int) -> None:
        os.environ.update(RANK=f"{rank}", WORLD_SIZE=f"{world}", MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
        result = work(join(torch.device("cpu")))
        (folder / f"{world}.{rank}.json").write_text(json.dumps(result))

    children = [start(functools.partial(child, rank)) for rank in range(world)]
    assert [wait(each) for each in children] == [0] * world
    return [json.loads((folder / f"{world}.{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize(("samples", "batch"), [(8, 4), (10, 4), (5, 1), (3, 8), (12, 12)])
def test_an_order_has_every_sample_once_and_divides_every_batch(samples: int, batch: int) -> None:
    order = shuffled(samples, batch, torch.Generator().manual_seed(0))
    assert sorted(order) == list(range(samples))
    for begin in range(0, samples - batch + 1, batch):
        for world in (world for world in (1, 2, 3, 4) if batch % world == 0):
            counts = [sum(sample % world == rank for sample in order[begin : begin + batch]) for rank in range(world)]
            assert len(set(counts)) == 1
    assert order != shuffled(samples, batch, torch.Generator().manual_seed(1)) or batch >= samples


def learned_in_double(ranks: Ranks, samples: int) -> dict[str, Any]:
    """A smooth problem with two branches, NLC and running balances: nothing rounds but the sums themselves."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 7, 6, generator=generator, dtype=torch.float64)
    w = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    mine = x[ranks.rank :: ranks.world]

    def forward(learnables: dict[str, Tensor], chosen: Any) -> Tensor:
        if not chosen:
            return no_means(2, "mse+nlc", torch.device("cpu"))
        part = mine[list(chosen)]
        output = torch.tanh(part / learnables["a.scale"] @ w + learnables["a.shift"])
        return means(output, [torch.tanh(part @ w), torch.tanh(part @ w.T)], "mse+nlc")

    begin = {"a.scale": torch.linspace(0.5, 2, 6).double(), "a.shift": torch.full((6,), 0.3).double()}
    recipe = Recipe.preset("lrquant+", epochs=5, batch_size=4)
    done = learn(forward, begin, Batches(samples, 4, ranks), recipe=recipe, seed=3, on_epoch=lambda *_: None)
    losses = [*done.epoch_losses, done.initial_loss, done.final_loss]
    return {"losses": losses, **{name: tensor.tolist() for name, tensor in done.learnables.items()}}


@pytest.mark.parametrize("samples", [8, 10])  # of ten, a last batch of two leaves two of four ranks without work
def test_learning_is_the_same_on_1_2_and_4_ranks(samples: int, tmp_path: Path) -> None:
    alone = learned_in_double(ALONE, samples)
    # Double sums in another order differ by 1e-15; a rank without work hears of the loss in float32.
    tolerance = 1e-12 if samples % 4 == 0 else 1e-7
    for world in (2, 4):
        for found in on_ranks(world, functools.partial(learned_in_double, samples=samples), tmp_path):
            for name, values in alone.items():
                assert found[name] == pytest.approx(values, abs=tolerance, rel=tolerance)


def text_file(folder: Path) -> str:
    """A text that is soon read."""
    (folder / f"{os.getpid()}.txt").write_text(" ".join(map(str, range(900))))
    return str(folder / f"{os.getpid()}.txt")


def quantized_on(ranks: Ranks, tiny: Path, recipe: Recipe, folder: Path) -> dict[str, Any]:
    result = lrquant.quantize(str(tiny), recipe, calibration=IDS, save_dir=folder / f"out{ranks.world}")
    found = lrquant.evaluate(result.model, [text_file(folder)], 32, limit_windows=7, tokenizer=result.tokenizer)
    (perplexity,) = found.values()
    return {
        "bits": result.recipe.layer_bits,
        "perplexity": perplexity.value,
        "windows": list(perplexity.window_losses),
        "cosine": [record.cosine for record in result.records],
        "loss": [record.final_loss for record in result.records],
        "statistics": [
            [seen.absmax.tolist(), seen.midpoint.tolist()]  # type: ignore[union-attr]
            for block in result.result.statistics[:1]
            for _, seen in sorted(block.items())
        ],
        "learned": [
            torch.cat([block[name].flatten() for name in sorted(block)]).tolist() for block in result.result.learned
        ],
    }


@pytest.mark.parametrize(
    ("changes", "close"),
    # Rounding that is learned or that compensates takes a flipped integer further: such runs stay close, not the same.
    [
        ({"method": "lrquant"}, 1e-4),
        ({"rotate": ("stream", "values")}, 1e-4),
        ({"target_bits": 3.5, "group_size": 32}, 1e-4),
        ({"method": "lrquant-max"}, 0.05),
        ({"rounding": "gptq"}, 0.05),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_model_is_the_same_on_1_2_and_4_ranks(changes: dict[str, Any], close: float, tmp_path: Path) -> None:
    """At 3 bits a gradient stands far above the rounding that a sum in another order can flip; at 8 it would not."""
    tiny = write_tiny(tmp_path / "tiny")
    rates = {"let_lr": 1e-4, "lwc_lr": 1e-4, "rounding_lr": 1e-4}
    recipe = Recipe.preset(**changes, wbits=3, abits=16, epochs=2, batch_size=4, **rates)
    alone = quantized_on(ALONE, tiny, recipe, tmp_path)
    for world in (2, 4):
        work = functools.partial(quantized_on, tiny=tiny, recipe=recipe, folder=tmp_path)
        first, *others = on_ranks(world, work, tmp_path)
        assert all(other == first for other in others)  # every rank knows everything
        assert first["bits"] == alone["bits"]
        for mine, theirs in zip(first["statistics"], alone["statistics"], strict=True):
            assert mine[0] == pytest.approx(theirs[0], rel=1e-5)
            assert mine[1] == pytest.approx(theirs[1], rel=1e-4, abs=1e-5)
        for name in ("perplexity", "windows", "cosine", "loss"):
            assert first[name] == pytest.approx(alone[name], rel=close), name
        for mine, theirs in zip(first["learned"], alone["learned"], strict=True):
            # Four steps of 1e-4: an offset whose gradient is next to nothing may still go the other way.
            if close == 1e-4:
                assert sum(abs(a - b) for a, b in zip(mine, theirs, strict=True)) / len(mine) < 2e-6


def test_ranks_divide_what_bits_are_worth_and_choose_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when one of them went on from an interrupted run's choice: then nothing is measured."""
    tiny = write_tiny(tmp_path / "tiny")
    recipe = Recipe.preset("rtn", wbits=4, target_bits=4.5, group_size=32)
    real, measured = allocation._Measuring._error, [0]

    def error(*arguments: Any) -> float:
        measured[0] += 1
        return real(*arguments)

    monkeypatch.setattr(allocation._Measuring, "_error", error)

    class Stops(Callback):
        def started(self, blocks: int, epochs: int) -> None:
            raise KeyboardInterrupt

    def work(ranks: Ranks) -> Any:
        measured[0] = 0
        result = lrquant.quantize(str(tiny), recipe, calibration=IDS, save_dir=tmp_path / f"out{ranks.world}")
        return [measured[0], result.recipe.layer_bits]

    everything, bits = work(ALONE)
    assert everything == 2 * 4 * 6  # blocks, units, candidates
    assert on_ranks(2, work, tmp_path) == [[everything // 2, bits]] * 2


def test_work_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(UsageError, match="batch size 3 cannot be divided over 2 ranks: give --batch-size 4"):
        check_batch(3, 8, Ranks(0, 2), learns=True)
    with pytest.raises(UsageError, match="3 samples cannot be divided over 4 ranks"):
        check_batch(1, 3, Ranks(0, 4), learns=False)
    check_batch(1, 8, Ranks(0, 4), learns=False)


def test_ranks_that_were_given_different_samples_are_told(tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path / "tiny")

    def work(ranks: Ranks) -> str:
        samples = [ids + ranks.rank for ids in IDS]
        try:
            lrquant.quantize(str(tiny), Recipe.preset("rtn"), calibration=samples, save_dir=tmp_path / "out")
        except LrquantError as error:
            return str(error)
        return "done"

    first, second = on_ranks(2, work, tmp_path)
    assert second == "rank 1 has other arguments than the first rank: the calibration samples changed"
    assert first == "another rank has ended or cannot be reached; see its message; nothing was left behind"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_that_dies_ends_the_run_and_another_number_of_ranks_goes_on(
    dead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank holds the lock and writes; the other only learns."""
    tiny = write_tiny(tmp_path / "tiny", num_hidden_layers=3)
    recipe = Recipe.preset("lrquant", wbits=4, abits=4, epochs=1, batch_size=4)
    real, learned = solving.learn, []
    here = ALONE

    def dies(*arguments: Any, seed: int, **more: Any) -> Any:
        learned.append(seed)
        if here.rank == dead and here.world == 2 and seed == 2:
            os._exit(9)
        return real(*arguments, seed=seed, **more)

    monkeypatch.setattr(solving, "learn", dies)

    def work(rank: int, port: int) -> None:
        nonlocal here
        os.environ.update(RANK=f"{rank}", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
        here = join(torch.device("cpu"))
        with pytest.raises(LrquantError, match="another rank has ended") as failed:
            lrquant.quantize(str(tiny), recipe, calibration=IDS, save_dir=tmp_path / "out")
        if here.first:
            assert str(failed.value).endswith("2 finished blocks are kept; the same command resumes there")
            assert isinstance(failed.value.__cause__, LostRank)

    began, port = time.monotonic(), free_port()
    children = [start(functools.partial(work, rank, port)) for rank in (0, 1)]
    assert [wait(child) for child in children] == ([9, 0] if dead == 0 else [0, 9])
    assert time.monotonic() - began < 60
    assert not (tmp_path / "out").exists()
    assert run_folder(tmp_path / "out").is_dir()

    def goes_on(ranks: Ranks) -> list[int]:
        result = lrquant.quantize(str(tiny), recipe, calibration=IDS, save_dir=tmp_path / "out")
        return [len(result.records), *learned]

    assert on_ranks(4, goes_on, tmp_path) == [[3, 2]] * 4  # three blocks, of which only the last is learned
    assert not run_folder(tmp_path / "out").exists()
    (perplexity,) = lrquant.evaluate(str(tmp_path / "out"), [text_file(tmp_path)], 32, limit_windows=2).values()
    assert math.isfinite(perplexity.value)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}


def torchrun(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=200
    )


def test_torchrun_on_the_command_line(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny")
    text = text_file(tmp_path)
    settings = ["--calib", text, "--nsamples", 4, "--seqlen", 32, "--epochs", 1, "--no-report"]
    command = ["-m", "lrquant", "quantize", "tiny", "--save-dir", "out", *settings]
    refused = torchrun(tmp_path, *command, "--batch-size", 1)
    assert refused.returncode != 0
    assert "rank 0: batch size 1 cannot be divided over 2 ranks: give --batch-size 2" in refused.stderr
    assert not (tmp_path / "out").exists()
    assert not run_folder(tmp_path / "out").exists()
    done = torchrun(tmp_path, *command, "--batch-size", 2, "--eval-ppl", text, "--limit-windows", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved to") == 1
    assert done.stdout.count("3 windows of 32") == 1
    assert done.stderr.count("block 1 (2/2)") == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["out", "tiny"]
    again = torchrun(tmp_path, "-m", "lrquant", "eval", "out", "--ppl", text, "--seqlen", 32, "--json", "two.json")
    assert again.returncode == 0, again.stderr
    alone = lrquant_here("eval", "out", "--ppl", text, "--seqlen", 32, "--json", "one.json", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    two, one = (json.loads((tmp_path / name).read_text()) for name in ("two.json", "one.json"))
    assert two["evaluation"] == one["evaluation"]
    for name, value in one["perplexity"].items():
        assert two["perplexity"][name] == pytest.approx(value, rel=1e-6)


def ranks_below(process: int) -> dict[int, int]:
    """Process ids by rank of what torchrun, as `process`, has started."""
    found = {}
    for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
        facts = dict(
            each.split("=", 1) for each in Path(f"/proc/{child}/environ").read_text().split("\0") if "=" in each
        )
        if "RANK" in facts:
            found[int(facts["RANK"])] = int(child)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="ranks are found in /proc")
def test_two_machines_of_which_one_loses_its_rank(tmp_path: Path) -> None:
    """Two torchruns that meet by a port stand for two machines; the run goes on without torchrun."""
    write_tiny(tmp_path / "tiny", num_hidden_layers=4)
    command = ["quantize", "tiny", "--save-dir", "out", "--calib", text_file(tmp_path), "--nsamples", 4]
    command += ["--seqlen", 32, "--batch-size", 2, "--epochs", 100, "--kernels", "eager", "--no-report"]
    meet = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    machines = [
        subprocess.Popen(
            [*TORCHRUN, *meet, "--nproc-per-node", "1", "-m", "lrquant", *map(str, command)],
            cwd=tmp_path,
            env=os.environ | ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    while not (run_folder(tmp_path / "out") / "00000.json").exists():
        assert all(machine.poll() is None for machine in machines)
        time.sleep(0.02)
    ranks = {rank: process for machine in machines for rank, process in ranks_below(machine.pid).items()}
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[1], signal.SIGKILL)
    said = "".join(machine.communicate(timeout=90)[1] for machine in machines)
    assert all(machine.returncode != 0 for machine in machines)
    assert "rank 0: another rank has ended or cannot be reached" in said
    assert "Signal 9 (SIGKILL) received" in said
    assert not (tmp_path / "out").exists()
    alone = lrquant_here(*command, cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()
