"""Estimate a run: sizes from the model without its weights, time and memory from a trial of one block.

The engine learns the first block of every stage for a few steps, on the samples of one step, with the recipe's batch
size and sequence length. The cost of a block follows from that:

    seconds per block = steps · step + passes · pass + what is left (reading, freezing, packing), once
    peak memory       = this process's peak after the trial + the hidden states of the samples that were not tried

`pass` is one forward pass over a sample. Each sample makes two of them, three with two branches, and up to 32 samples
are measured before and after learning. Nothing is written. With mixed precision, the budget is used in place of each
linear's bits, and the pass that measures errors is not counted.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lrquant.architectures.targets import linears_of
from lrquant.calibration.activation_cache import ActivationStore, Where
from lrquant.entrypoints.preparation import (
    PreparedRun,
    check_result,
    check_shared,
    linears_by_path,
    pick_machine,
    prepare,
)
from lrquant.export.packing import Packer
from lrquant.export.shards import MOST_BYTES
from lrquant.loading.original import BlockPlace
from lrquant.loading.pretrained import fetched_folder
from lrquant.loading.validation import weight_files
from lrquant.passes.pipeline import carry_out
from lrquant.recipe import Recipe
from lrquant.reconstruction.block_optimizer import MOST_MEASURED
from lrquant.reconstruction.block_parameters import FrozenBlock, buffers_of
from lrquant.reconstruction.callbacks import Callback
from lrquant.reconstruction.coverage import Coverage
from lrquant.reconstruction.journal import FinishedBlock, Journal
from lrquant.reconstruction.records import BlockRecord
from lrquant.resume.frozen_tensors import tensors_of
from lrquant.resume.run_directory import check_place, resolved, run_folder
from lrquant.runtime.distributed import Ranks
from lrquant.runtime.memory import PeakMemory

STEPS = 4  # of learning that are tried
PASSES_OF_TUNING = 4  # forward passes that a step of tuning takes as long as: forward, again, and backward


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds of a run. Memory is the device's on an accelerator, else this process's."""

    blocks: int
    block_parameters: int
    parameters: int
    read_bytes: int  # the model's weight files, once
    checkpoint_bytes: int  # the result's tensors
    work_bytes: int  # finished blocks, beside the result until it is whole
    activations: str  # where hidden states wait
    activation_bytes: int
    peak_memory_bytes: int
    step_seconds: float
    seconds: float
    coverage: Coverage | None = None  # which share of the model is quantized
    notes: tuple[str, ...] = ()  # what a user should know before the run

    def as_dict(self) -> dict[str, Any]:
        return vars(self) | {"coverage": self.coverage.as_dict() if self.coverage is not None else None}


def estimate(
    model: Any,
    recipe: Recipe,
    device: str = "auto",
    *,
    activations: Where = "auto",
    trust_remote_code: bool = False,
    ranks: int = 1,
    save_dir: str | Path | None = None,
) -> Estimate:
    """Size, memory and time of `quantize` with `model` and `recipe`; per process, if `ranks` share the run.

    Nothing is written, not even to `save_dir`.

    Raises:
        UsageError, LrquantError: as `quantize` would.
    """
    began, memory = time.perf_counter(), PeakMemory()
    if save_dir is not None:
        check_place(resolved(save_dir), run_folder(Path(save_dir)))
    check_shared(recipe, None, Ranks(0, ranks))
    machine = pick_machine(recipe, device, shared=False)
    prepared = prepare(model, recipe, machine, in_memory=False, trust_remote_code=trust_remote_code)
    planned = check_result(prepared)
    mine = -(-prepared.recipe.nsamples // ranks)
    tried = _tried(prepared, ranks)
    cache = prepared.cache(activations, samples=mine)
    firsts, original = _firsts(prepared), prepared.original
    trial = _Trial(
        frozenset(firsts.values()), Packer(original.model, prepared.recipe.stored_scheme, original.storage_dtype)
    )
    clock = _Clock(len(tried.samples))
    guess = _Extrapolation(
        prepared, trial, clock, cache, mine, firsts=firsts, planned=planned, opened=time.perf_counter() - began
    )
    with prepared.advising(cache):
        carry_out(tried.run(_InMemory(cache, machine.device), journal=trial, callback=clock))
    return guess.estimate(memory.peak_bytes())


def _firsts(prepared: PreparedRun) -> dict[int, int]:
    """Every block by number → the block that is tried for it: the first of its stage that has something to quantize."""
    linears, scheme = linears_by_path(prepared.original), prepared.recipe.scheme
    chosen = {name for name in linears if not scheme.leaves(name)}
    firsts: dict[int, int] = {}
    for stage in prepared.original.stages:
        places = [place for place in prepared.original.places if place.stage is stage]
        first = next((each for each in places if any(name.startswith(f"{each.path}.") for name in chosen)), places[0])
        firsts |= dict.fromkeys((place.index for place in places), first.index)
    return firsts


def _tried(prepared: PreparedRun, ranks: int) -> PreparedRun:
    """One step's worth of samples, for a few steps; what comes after the blocks is left out."""
    recipe = prepared.recipe
    batch = max(1, min(recipe.batch_size, recipe.nsamples) // ranks)
    tried = recipe.changed(
        nsamples=batch,
        batch_size=batch,
        epochs=min(recipe.epochs, STEPS),
        early_stop=0.0,
        tuning_epochs=0,
        extra=(),
        window=1,
        window_overlap=0,
    )
    return replace(prepared, recipe=tried, samples=prepared.samples[:batch])


@dataclass
class _Extrapolation:
    """Extrapolates from the first block of every stage to all blocks, and from a few samples to all.

    Args:
        mine: samples of one process.
        firsts: the block that was tried for each.
        planned: bytes of every block in the checkpoint, by path, added biases left out.
        opened: seconds until the first block.
    """

    prepared: PreparedRun
    trial: "_Trial"
    clock: "_Clock"
    cache: ActivationStore
    mine: int
    firsts: Mapping[int, int]
    planned: Mapping[str, int]
    opened: float

    def __post_init__(self) -> None:
        model = self.prepared.original.model
        blocks = [model.get_submodule(place.path) for place in self.prepared.original.places]
        self.sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
        self.parameters = sum(parameter.numel() for parameter in model.parameters())

    def estimate(self, peak_bytes: int) -> Estimate:
        """Once the trial is over; `peak_bytes` is its peak memory."""
        original = self.prepared.original
        checkpoint, work = self._bytes()
        folder = fetched_folder(original.name)
        return Estimate(
            blocks=len(self.sizes),
            block_parameters=sum(self.sizes),
            parameters=self.parameters,
            read_bytes=sum(file.stat().st_size for file in weight_files(folder)) if folder else self.parameters * 2,
            checkpoint_bytes=checkpoint,
            work_bytes=work,
            activations=self.cache.where,
            activation_bytes=self.cache.bytes_expected,
            peak_memory_bytes=peak_bytes + self._more_memory(checkpoint),
            step_seconds=self.clock.step(self.firsts[0]),
            seconds=self._seconds(),
            coverage=self.prepared.coverage,
            notes=tuple(self.prepared.notes),
        )

    def _parts(self) -> Iterator[tuple[int, float]]:
        """Of every block, the one that was tried for it and how many times larger it is than that."""
        for place, size in zip(self.prepared.original.places, self.sizes, strict=True):
            first = self.firsts[place.index]
            yield first, size / max(1, self.sizes[first])

    def _seconds(self) -> float:
        recipe, clock, streams = self.prepared.recipe, self.clock, self.prepared.streams
        steps = recipe.epochs * -(-recipe.nsamples // recipe.batch_size) if recipe.learns else 0
        if recipe.window > 1:  # each block alone, then with every window that it is in
            steps += steps * recipe.window // (recipe.window - recipe.window_overlap)
        seconds = self.opened
        for first, like in self._parts():
            seconds += like * clock.block_seconds(first, steps, samples=self.mine, streams=streams)
            seconds += like * clock.forward(first) * PASSES_OF_TUNING * self.mine * recipe.tuning_epochs
        return seconds

    def _bytes(self) -> tuple[int, int]:
        """(the checkpoint's tensors, finished blocks beside it until it is whole)."""
        recipe, trial = self.prepared.recipe, self.trial
        checkpoint = work = 0.0
        places = self.prepared.original.places
        for place, (first, like) in zip(places, self._parts(), strict=True):
            packed = self._within_budget(place)
            if recipe.target_bits is None:
                packed = trial.packed[first] * self.planned[place.path] / max(1, self.planned[places[first].path])
            checkpoint += packed
            work += like * trial.kept[first]
        checkpoint += (self.parameters - sum(self.sizes)) * self.prepared.original.storage_dtype.itemsize
        return int(checkpoint), int(work)

    def _within_budget(self, place: BlockPlace) -> float:
        """A block's bytes when its quantized weights take the bits of the budget on average."""
        recipe, original = self.prepared.recipe, self.prepared.original
        linears = linears_of(original.model.get_submodule(place.path))
        chosen = recipe.scheme.within(place.path).chosen(linears).values()
        weights = sum(linear.weight.numel() for linear in chosen)
        kept = (self.sizes[place.index] - weights) * original.storage_dtype.itemsize
        return kept + weights * (recipe.target_bits or 0) / 8

    def _more_memory(self, checkpoint: int) -> int:
        """Bytes that the run holds and the trial did not: hidden states, integers, a shard being written."""
        on_cpu = self.prepared.machine.device.type == "cpu"
        counted = self.cache.where != "disk" if on_cpu else self.cache.where == "device"
        held = max(0, self.mine - self.clock.tried) * (self.cache.bytes_expected // self.mine)
        head = min(MOST_BYTES, checkpoint) if self.prepared.original.is_offloaded and on_cpu else 0
        integers = sum(self.sizes) if self.prepared.keeps_blocks else 0  # of the whole model, a byte each
        return integers + (held if counted else 0) + head


class _InMemory(ActivationStore):
    """Asks the real cache where the streams would be kept, and keeps those of the trial in memory."""

    def __init__(self, real: ActivationStore, device: torch.device) -> None:
        super().__init__("host", device, Path(), 1, 1)
        self._real, self._here = real, device

    def stream(self, first: Tensor) -> Any:
        self._real.expect(first)
        self.where = "device" if self._real.where == "device" else "host"
        return super().stream(first)


class _Clock(Callback):
    """When each block began, was decided and ended, and when its epochs ended; `tried` samples went through it."""

    def __init__(self, tried: int) -> None:
        self.tried = tried
        self._epochs: dict[int, list[float]] = {}
        self._began: dict[int, float] = {}
        self._decided: dict[int, float] = {}
        self._ended: dict[int, float] = {}
        self._done: dict[int, float] = {}

    def block_begins(self, view: Any) -> None:
        self._began[view.index] = time.perf_counter()

    def epoch_done(self, block: int, epoch: int, loss: float) -> None:
        self._epochs.setdefault(block, []).append(time.perf_counter())

    def block_decided(self, view: Any, decided: Any) -> None:
        self._decided[view.index] = time.perf_counter()

    def block_ends(self, view: Any) -> None:
        self._ended[view.index] = time.perf_counter()

    def block_done(self, record: BlockRecord) -> None:
        self._done[record.index] = time.perf_counter()

    def step(self, block: int) -> float:
        """Seconds of one step, once what is compiled is compiled."""
        ends = self._epochs.get(block, [])
        return median(after - before for before, after in pairwise(ends)) if len(ends) > 1 else 0.0

    def forward(self, block: int) -> float:
        """Seconds of one sample's way through the quantized block."""
        return (self._ended[block] - self._decided[block]) / self.tried

    def block_seconds(self, block: int, steps: int, *, samples: int, streams: int) -> float:
        """Seconds of a block with so many steps, samples and streams, by what was seen of `block`."""
        forward, tried = self.forward(block), self.tried
        measured = 2 * min(samples, MOST_MEASURED) if steps else min(samples, MOST_MEASURED)
        spent = self._done[block] - self._began[block]
        known = len(self._epochs.get(block, [])) * self.step(block) + forward * tried * (streams + (2 if steps else 1))
        return steps * self.step(block) + forward * (samples * streams + measured) + max(0.0, spent - known)


class _Trial(Journal):
    """Reconstructs only the blocks `firsts`, and counts the bytes that a journal on disk would write for them."""

    keeps_frozen = True

    def __init__(self, firsts: frozenset[int], packer: Packer) -> None:
        self._firsts, self._packer = firsts, packer
        self.packed: dict[int, int] = {}
        self.kept: dict[int, int] = {}

    def bits(self, found: Callable[[], dict[str, int]]) -> dict[str, int]:
        return {}  # finding them takes a pass through the model

    def finished(self, place: int) -> bool:
        return place not in self._firsts

    def restore(self, place: int, block: nn.Module) -> tuple[FinishedBlock, Mapping[str, Tensor]]:
        return self.summary(place), {name: tensor.detach() for name, tensor in block.named_parameters()}

    def summary(self, place: int) -> FinishedBlock:
        return FinishedBlock({}, {}, BlockRecord(place, 0.0, 0.0, "initial"), (), ())

    def block_done(self, place: int, path: str, block: nn.Module, finished: FinishedBlock, frozen: FrozenBlock) -> None:
        buffers = buffers_of(block, self._packer.storage_dtype)
        kept = [*tensors_of(frozen).values(), *finished.tensors().values(), *buffers.values()]
        self.kept[place] = sum(tensor.nbytes for tensor in kept)
        self.packed[place] = sum(tensor.nbytes for tensor in self._packer.block(path, frozen, buffers).values())
