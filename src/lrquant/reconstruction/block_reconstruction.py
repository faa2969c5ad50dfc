"""Providers of a block's parameters: `Learn` learns them, `restore` takes those of an earlier run.

begin     statistics from x ← f(x; W); what stays fixed, and θ as it starts
solve     θ* minimises loss(f(x̂; W(θ), activations quantized), targets)     rounding.py, block_optimizer.py
freeze    W(θ*) → integers, scales, zero points                            block_parameters.py
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lrquant.errors import UsageError
from lrquant.formats import kernels
from lrquant.formats.activation_quant import quantized_activations
from lrquant.reconstruction.block_event import BlockDecision
from lrquant.reconstruction.block_optimizer import Learned, or_present
from lrquant.reconstruction.block_parameters import FrozenBlock, freeze
from lrquant.reconstruction.block_preparation import check_fits
from lrquant.reconstruction.fixed_parameters import BlockParameters
from lrquant.reconstruction.initial_state import begin, frozen_again
from lrquant.reconstruction.journal import FinishedBlock
from lrquant.reconstruction.learnables import Learnables
from lrquant.reconstruction.records import BlockRecord
from lrquant.reconstruction.rounding import Problem, solve
from lrquant.reconstruction.run import BlockOutcome, BlockTask
from lrquant.transforms.statistics import ChannelStatistics


def restore(task: BlockTask) -> BlockOutcome | None:
    """The block as an earlier run finished it; None: it is not finished."""
    run, index = task.run, task.place.index
    found = run.journal.restore(index, task.block) if run.journal.finished(index) else None
    if found is None:
        return None
    finished, parameters = found
    frozen = None
    if run.keeps_blocks:
        frozen = frozen_again(task.block, task.place.path, task.equivalences, finished, run.recipe, run.storage_dtype)
    _, flat = task.forward.advance_full_precision(task.full_precision)
    return BlockOutcome(parameters, finished.static_scales, flat, finished, frozen)


@dataclass(frozen=True)
class Rival:
    """Parameters that a block keeps unless learning finds better ones."""

    parameters: Mapping[str, Tensor]
    static_scales: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Begun:
    """A block before learning: its fixed parameters and the initial values of its learnables."""

    fixed: BlockParameters
    start: Learnables
    added_biases: Sequence[str]  # modules that were given a bias for their shifts
    statistics: Mapping[str, ChannelStatistics]
    flat_inputs: set[str]
    expert_tokens: Mapping[str, int]  # BlockRecord.expert_tokens


@dataclass(frozen=True)
class Learn:
    """Learns every block.

    Args:
        statistics: those of an earlier run, one mapping per block, instead of statistics of the samples.
        start_from: learnables of an earlier run, one mapping per block, as initial values.
    """

    statistics: Sequence[Mapping[str, ChannelStatistics]] | None = None
    start_from: Sequence[Learnables] | None = None

    def __call__(self, task: BlockTask) -> BlockOutcome:
        return self.learned(task, None)

    def learned(self, task: BlockTask, rival: Rival | None) -> BlockOutcome:
        """The learned parameters, or `rival` if those are better."""
        run, recipe, forward = task.run, task.run.recipe, task.forward
        own_targets = forward.outputs(task.quantized, run.cache) if recipe.two_branch else None
        begun = self.begin(task)
        targets = [task.full_precision] if own_targets is None else [task.full_precision, own_targets]
        with self.rounding(task, begun):
            problem = Problem(task.place.index, begun.fixed, begun.start, task.quantized, targets)
            learned = solve(forward, problem, recipe=recipe, compiled=run.compiled, on_epoch=run.callback.epoch_done)
            if rival is not None:
                now = forward.fixed_function(rival.parameters, task.quantized, targets, loss=recipe.loss)
                learned = or_present(learned, now, forward.batches, recipe=recipe)
        return self.finish(task, begun, learned, rival=rival)

    def finish(self, task: BlockTask, begun: Begun, learned: Learned, *, rival: Rival | None = None) -> BlockOutcome:
        """Freeze the learned block; static activation scales are calibrated on the current x̂."""
        run = task.run
        frozen = freeze(begun.fixed, learned.learnables)
        with self.rounding(task, begun):
            scales = task.forward.static_scales(
                task.quantized, frozen, run.recipe.scheme.within(task.place.path), run.storage_dtype
            )
        frozen = replace(frozen, static_scales=scales)
        finished = _finished(task.place.index, begun, learned, frozen=frozen)
        if rival is not None and learned.outcome == "kept present":
            return BlockOutcome(rival.parameters, rival.static_scales, begun.flat_inputs, finished, fresh=True)
        check_fits(frozen, task.place.path, run.storage_dtype)
        input_args = run.input_args(task.block, task.place.path, begun.flat_inputs)
        decision = BlockDecision(begun.fixed, begun.start, learned.learnables, frozen, input_args, run.attention_scheme)
        run.callback.block_decided(task.event, decision)
        parameters = frozen.parameters(next(task.block.parameters()).dtype)
        return BlockOutcome(parameters, frozen.static_scales, begun.flat_inputs, finished, frozen, fresh=True)

    @contextmanager
    def rounding(self, task: BlockTask, begun: Begun) -> Iterator[None]:
        """A context in which the block's activations are quantized, with the recipe's kernels."""
        run = task.run
        input_args = run.input_args(task.block, task.place.path, begun.flat_inputs)
        with quantized_activations(task.block, input_args, run.attention_scheme), kernels.using(run.recipe.kernels):
            yield

    def begin(self, task: BlockTask) -> Begun:
        """Advance x and prepare the block for learning."""
        run, index = task.run, task.place.index
        statistics, flat = task.forward.advance_full_precision(task.full_precision)
        if self.statistics is not None:
            given = self.statistics[index]
            statistics = {name: value.to(run.machine.device) for name, value in given.items()}
        fixed, start, slots = begin(
            task.block, task.place.path, index, task.equivalences, statistics, run.recipe, run.storage_dtype
        )
        if self.start_from is not None:
            start = _checked_start(start, self.start_from[index], index=index, device=run.machine.device)
        return Begun(fixed, start, slots, statistics, flat, task.forward.expert_tokens)


def _finished(index: int, begun: Begun, learned: Learned, *, frozen: FrozenBlock) -> FinishedBlock:
    """The finished block, on the CPU; its cosine and seconds are not known yet."""
    record = BlockRecord(
        index,
        learned.initial_loss,
        learned.final_loss,
        learned.outcome,
        learned.epoch_losses,
        learned.recoveries,
        epochs_left=learned.epochs_left,
        expert_tokens=dict(begun.expert_tokens),
    )
    return FinishedBlock(
        {name: tensor.cpu() for name, tensor in learned.learnables.items()},
        {name: value.to(torch.device("cpu")) for name, value in begun.statistics.items()},
        record,
        tuple(sorted(begun.flat_inputs)),
        tuple(begun.added_biases),
        {name: scale.clone() for name, scale in frozen.static_scales.items()},  # files hold no tensor twice
    )


def _checked_start(start: Learnables, given: Learnables, *, index: int, device: torch.device) -> Learnables:
    """`given` in place of `start`, when it is the same learnables of the same shapes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in start.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in given.items()}:
        odd = sorted(shapes.keys() ^ given.keys()) or [name for name in shapes if shapes[name] != given[name].shape]
        raise UsageError(
            f"the saved parameters of block {index} do not fit this model and recipe ({odd[0]}, …); "
            f"use the options with which they were learned"
        )
    return {name: given[name].to(device) for name in start}
