"""What a run will cost, before anything is spent: sizes from the model's skeleton, time and memory from one block.

One step's worth of samples goes through the first block of every stage, by the engine itself and with the recipe's
real batch and length, for a few steps. What a block costs follows from that:

    seconds per block = steps · step + passes · pass + what is left (reading, freezing, packing), once
    peak memory       = this process's peak after the trial + the hidden states of the samples that were not tried

`pass` is one forward pass over a sample. Each sample makes two of them, three with two branches, and up to 32 samples
are measured before and after learning. Nothing is written. Where bits are to be divided among linears, the budget
stands for what they will be, and the pass that measures them is not counted.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lrquant.architectures import family_of
from lrquant.calibration.activation_cache import ActivationStore, Where
from lrquant.calibration.samples import samples_of
from lrquant.errors import UsageError
from lrquant.export.compressed_tensors import buffers_of, needs_whole_weights, pack_block
from lrquant.export.shards import MOST_BYTES
from lrquant.loading.auto_class import modality_of
from lrquant.loading.block_source import BlockSource
from lrquant.loading.offload import open_offloaded
from lrquant.loading.pretrained import (
    compute_dtype,
    fetched_folder,
    load_model,
    load_processor,
    pick_device,
    stored_dtype,
    window,
)
from lrquant.loading.validation import weight_files
from lrquant.recipe import Recipe
from lrquant.reconstruction import BlockRecord, reconstruct
from lrquant.reconstruction.block_optimizer import MOST_MEASURED
from lrquant.reconstruction.block_parameters import FrozenBlock
from lrquant.reconstruction.callbacks import Callback
from lrquant.reconstruction.journal import FinishedBlock, Journal
from lrquant.runtime.distributed import local_world
from lrquant.runtime.execution import settle
from lrquant.runtime.memory import PeakMemory
from lrquant.runtime.oom import advised, knobs

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

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def estimate(
    model: str,
    recipe: Recipe,
    device: str = "auto",
    activations: Where = "auto",
    trust_remote_code: bool = False,
    ranks: int = 1,
) -> Estimate:
    """What `quantize` of `model` by `recipe` will read, write, hold and take; per process, where `ranks` share the run.

    Raises:
        UsageError, LrquantError: as `quantize` would.
    """
    began = time.perf_counter()
    memory = PeakMemory()
    on = pick_device(device)
    dtype = compute_dtype(recipe.dtype, on)
    streamed = (
        None if recipe.also or recipe.tuning_epochs else open_offloaded(model, dtype, recipe.towers, trust_remote_code)
    )
    whole = streamed[0] if streamed is not None else load_model(model, dtype, trust_remote_code)
    if getattr(whole.config, "quantization_config", None):
        raise UsageError(f"{model}: already quantized; quantize the original model")
    block_source = streamed[1] if streamed is not None else BlockSource(whole, keeps=False)
    storage_dtype = stored_dtype(model, trust_remote_code)
    family = family_of(whole)
    blocks = [block for stage in family.stages(whole, recipe.towers) for block in stage.blocks(whole)]
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    parameters = sum(parameter.numel() for parameter in whole.parameters())
    firsts, place = [], 0
    for stage in family.stages(whole, recipe.towers):
        firsts.append(place)
        place += len(stage.blocks(whole))

    mine, batch = -(-recipe.nsamples // ranks), max(1, min(recipe.batch_size, recipe.nsamples) // ranks)
    modality, config = modality_of(whole), whole.config.get_text_config()
    processor = load_processor(model, modality, trust_remote_code)
    samples, recipe = samples_of(modality, processor, recipe, lambda seqlen: window(config, seqlen))
    samples = samples[:batch]
    streams = 2 + recipe.two_branch
    store = ActivationStore(activations, on, Path(), mine, streams, local_world())
    clock, trial = _Clock(), _Trial(frozenset(firsts), storage_dtype, recipe)
    tokens = recipe.seqlen or 1
    tried = settle(recipe, on, blocks, recipe.nsamples, tokens).changed(
        nsamples=batch, batch_size=batch, epochs=min(recipe.epochs, STEPS), early_stop=0.0, tuning_epochs=0
    )
    tried = tried.model_copy(update={"also": ()})
    opened = time.perf_counter() - began
    with advised(lambda: knobs(recipe, store.where, dtype)):
        reconstruct(
            whole, family, tried, samples, on, storage_dtype, clock, journal=trial, block_source=block_source,
            store=_InMemory(store, on),
        )  # fmt: skip
    steps = recipe.epochs * -(-recipe.nsamples // recipe.batch_size) if recipe.learns else 0
    seconds, checkpoint, work = opened, 0.0, 0.0
    for index, size in enumerate(sizes):
        first = max(place for place in firsts if place <= index)
        like = size / max(1, sizes[first])
        seconds += like * clock.block_seconds(first, steps, mine, batch, streams)
        seconds += like * clock.forward(first, batch) * PASSES_OF_TUNING * mine * recipe.tuning_epochs
        packed = trial.packed[first] if recipe.target_bits is None else sizes[first] * recipe.target_bits / 8
        checkpoint += like * packed
        work += like * (packed + trial.kept[first] - trial.packed[first])
    checkpoint += (parameters - sum(sizes)) * storage_dtype.itemsize
    per_sample = store.bytes_expected // (mine * streams)
    held = max(0, mine - batch) * streams * per_sample
    in_memory = store.where == "host" if on.type != "cpu" else store.where != "disk"
    counted = in_memory if on.type == "cpu" else store.where == "device"
    head = 0 if streamed is None else min(MOST_BYTES, int(checkpoint))
    integers = sum(sizes) if recipe.tuning_epochs else 0  # of the whole model, a byte each
    folder = fetched_folder(model)
    return Estimate(
        blocks=len(blocks),
        block_parameters=sum(sizes),
        parameters=parameters,
        read_bytes=sum(file.stat().st_size for file in weight_files(folder)) if folder else parameters * 2,
        checkpoint_bytes=int(checkpoint),
        work_bytes=int(work),
        activations=store.where,
        activation_bytes=store.bytes_expected,
        peak_memory_bytes=memory.peak_bytes() + integers + (held if counted else 0) + (head if on.type == "cpu" else 0),
        step_seconds=clock.step(firsts[0]),
        seconds=seconds,
    )


class _InMemory(ActivationStore):
    """Lets the real store decide where its streams would be, and keeps the trial's in memory."""

    def __init__(self, real: ActivationStore, device: torch.device) -> None:
        super().__init__("host", device, Path(), 1, 1)
        self._real, self._here = real, device

    def stream(self, first: Tensor) -> Any:
        self._real.expect(first)
        self.where = "device" if self._real.where == "device" else "host"
        return super().stream(first)


class _Clock(Callback):
    """When each block began, was decided and ended, and when its epochs ended."""

    def __init__(self) -> None:
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

    def forward(self, block: int, tried: int) -> float:
        """Seconds of one sample's way through the quantized block."""
        return (self._ended[block] - self._decided[block]) / tried

    def block_seconds(self, block: int, steps: int, samples: int, tried: int, streams: int) -> float:
        forward = self.forward(block, tried)
        measured = 2 * min(samples, MOST_MEASURED) if steps else min(samples, MOST_MEASURED)
        spent = self._done[block] - self._began[block]
        known = len(self._epochs.get(block, [])) * self.step(block) + forward * tried * (streams + (2 if steps else 1))
        return steps * self.step(block) + forward * (samples * streams + measured) + max(0.0, spent - known)


class _Trial(Journal):
    """Only the blocks `firsts` are to be done; counts the bytes that a journal on disk would write of them."""

    keeps_frozen = True

    def __init__(self, firsts: frozenset[int], storage_dtype: torch.dtype, recipe: Recipe) -> None:
        self._firsts, self._storage_dtype, self._scheme = firsts, storage_dtype, recipe.stored_scheme
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
        packed = pack_block(frozen, self._scheme.within(path), self._storage_dtype, needs_whole_weights(block, ""))
        packed |= {f"buffer:{name}": tensor for name, tensor in buffers_of(block, self._storage_dtype).items()}
        self.packed[place] = sum(tensor.nbytes for tensor in packed.values())
        self.kept[place] = self.packed[place] + sum(tensor.nbytes for tensor in finished.tensors().values())
