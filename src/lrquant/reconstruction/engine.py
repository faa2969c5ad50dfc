"""The block loop: two streams of hidden states through the model, one block on the device at a time.

    targets   x  ← f(x; W)          the full-precision stream, which also yields the statistics
    learn     θ* minimises loss(f(x̂; W(θ)), targets)
    freeze    W(θ*) → integers, scales, zero points
    advance   x̂ ← f(x̂; frozen)

The activation store holds both streams once (a third time per block for the two-branch loss); a stream
is overwritten sample by sample as it advances.

Once all blocks are done, the scales of the whole may be learned together (tuning.py).

A block that an earlier run finished (journal.py) is run through as it was left: x ← f(x; W), x̂ ← f(x̂; frozen).

A model with several stages (Swin's resolutions, the towers of a multimodal model) goes through the loop stage
by stage. What enters a later stage is found by running everything before it: once in full precision before
anything is changed, which starts x, and once with the earlier stages quantized, which starts x̂.
"""

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn

from lrquant.architectures import Family, MultimodalFamily, Stage
from lrquant.calibration.capture import BlockInputs, capture
from lrquant.distributed import ALONE, Ranks
from lrquant.errors import UsageError
from lrquant.formats import kernels
from lrquant.formats.activations import quantized_activations, route_attention, set_whole
from lrquant.recipe import Recipe
from lrquant.reconstruction.allocation import Allocation
from lrquant.reconstruction.beginning import begin, frozen_again
from lrquant.reconstruction.calls import BlockCalls
from lrquant.reconstruction.graphs import Graphs
from lrquant.reconstruction.journal import FinishedBlock, Journal
from lrquant.reconstruction.learning import Learnables, or_present
from lrquant.reconstruction.orthogonal import Rotated, rotate
from lrquant.reconstruction.outside import Outside, chosen_modules, round_outside
from lrquant.reconstruction.parameters import (
    FrozenBlock,
    freeze,
)
from lrquant.reconstruction.preparation import (
    check_finite,
    check_fits,
    check_group_size,
    enabled_equivalences,
    linear_input_args,
)
from lrquant.reconstruction.records import BlockRecord
from lrquant.reconstruction.residence import Residence, held
from lrquant.reconstruction.solving import solve
from lrquant.reconstruction.speed import settle
from lrquant.reconstruction.store import ActivationStore, Stream
from lrquant.reconstruction.tuning import Tuning, Whole, tune
from lrquant.reconstruction.view import BlockView, Decided
from lrquant.transforms.bias_slots import add_bias_slots, missing_biases
from lrquant.transforms.statistics import ChannelStatistics
from lrquant.watching import Watcher


@dataclass
class Reconstruction:
    """What the engine leaves behind besides the model, whose blocks now hold the quantized values."""

    recipe: Recipe  # as it was carried out: what it left to the machine is decided
    block_paths: list[str]  # in the order that data flows
    frozen: list[FrozenBlock] = field(default_factory=list)  # empty where a journal keeps them as they are
    learned: list[Learnables] = field(default_factory=list)  # without offsets where the model is not kept in memory
    statistics: list[dict[str, ChannelStatistics]] = field(default_factory=list)
    records: list[BlockRecord] = field(default_factory=list)
    flat_inputs: set[str] = field(default_factory=set)  # linears (full names) that see (tokens, width)
    added_biases: tuple[str, ...] = ()  # modules (full names) that got a bias for a shift
    rotated: Rotated = field(default_factory=Rotated)
    attention_quantized: bool = False
    outside: Outside = field(default_factory=Outside)  # what was rounded besides the blocks
    tuning: Tuning | None = None  # what came of learning the whole at last

    @property
    def needs_lrquant(self) -> bool:
        """Whether the model computes something that its family's own code does not."""
        return bool(self.added_biases or self.rotated.online)

    def add(self, path: str, finished: FinishedBlock, with_offsets: bool) -> None:
        """Take up the block at `path`. Offsets are left out where memory must not grow with the model."""
        self.learned.append(finished.learnables if with_offsets else finished.without_offsets().learnables)
        self.statistics.append(finished.statistics)
        self.records.append(finished.record)
        self.flat_inputs |= {f"{path}.{name}" for name in finished.flat_inputs}
        self.added_biases += tuple(f"{path}.{name}" for name in finished.added_biases)


@dataclass(frozen=True)
class Present:
    """A quantized model whose blocks `relearned` are to be learned again (test-time adaptation)."""

    blocks: Sequence[Mapping[str, Tensor]]  # dequantized parameters of every block, by name
    relearned: frozenset[int]
    input_scales: Sequence[Mapping[str, Tensor]] = ()  # of every block (FrozenBlock.input_scales), if there are any


def reconstruct(
    model: nn.Module,
    family: Family | MultimodalFamily,
    recipe: Recipe,
    samples: Sequence[dict[str, Any]],
    device: torch.device,
    storage_dtype: torch.dtype,
    watcher: Watcher,
    given_statistics: Sequence[dict[str, ChannelStatistics]] | None = None,
    start_from: Sequence[Learnables] | None = None,
    present: Present | None = None,
    journal: Journal | None = None,
    residence: Residence | None = None,
    store: ActivationStore | None = None,
    ranks: Ranks = ALONE,
) -> Reconstruction:
    """Quantize `model`'s blocks in place. `samples` are keyword arguments of single-sample calls.

    `start_from` holds learnables of an earlier run, one mapping per block, to start from. With `present`, only
    some blocks are learned again: the others run as they are there, and leave no entry in the result's lists.
    `journal` knows of blocks that an earlier run finished, `residence` where blocks come from, `store` where the
    streams live; left out, nothing is remembered and everything is in host memory. Every one of `ranks` is given all
    samples and works on its own; all come to the same blocks.
    """
    everything, samples = samples, ranks.share(samples)
    journal, residence = journal or Journal(), residence or Residence(model)
    if store is None:
        folder = Path(tempfile.gettempdir())
        store = ActivationStore("host", device, folder, len(samples), 2 + recipe.two_branch)
    stages = family.stages(model, recipe.towers)
    places = [(stage, index) for stage in stages for index in range(len(stage.blocks(model)))]
    paths = [f"{stage.path}.{index}" for stage, index in places]
    for stage in stages:
        check_group_size(stage.blocks(model)[0], recipe.scheme.group_size)
    for name, module in chosen_modules(model, recipe.also).items():
        if isinstance(module, nn.Linear):
            check_group_size(nn.ModuleDict({name.replace(".", "_"): module}), recipe.scheme.group_size)
    attention = recipe.scheme.attention
    attention_args = attention if attention and route_attention(model) else None
    result = Reconstruction(recipe, paths, attention_quantized=attention_args is not None)
    result.rotated = rotate(model, stages, recipe, residence, storage_dtype)
    if recipe.target_bits is not None and recipe.layer_bits is None:
        told = watcher.measured
        allocation = Allocation(model, family, recipe, everything, device, storage_dtype, residence, told, ranks)
        recipe = recipe.changed(layer_bits=journal.bits(allocation.layer_bits))
    scheme = recipe.scheme
    journal.open(len(paths))
    residence.take(paths[places.index((stages[-1], 0))])  # one block shows what blocks return
    inputs_of = [capture(model, stage.blocks(model), samples, store.stream) for stage in stages]
    blocks = [model.get_submodule(path) for path in paths]
    recipe = settle(recipe, device, blocks, len(everything), inputs_of[0].hidden[0].shape[-2])
    recipe = result.recipe = Recipe.parse(json.loads(ranks.text(json.dumps(recipe.model_dump(mode="json")))))
    graphs = Graphs(recipe, device)
    watcher.started(len(paths), recipe.epochs if recipe.learns else 0)
    for place, ((stage, index), path) in enumerate(zip(places, paths, strict=True)):
        if not residence.keeps and all(journal.finished(later) for later in range(place, len(paths))):
            result.add(path, journal.summary(place), with_offsets=False)  # nothing is left that needs its outputs
            watcher.block_done(result.records[-1])
            continue
        if index == 0:  # a stage begins
            equivalences = enabled_equivalences(stage.equivalences, recipe)
            inputs = inputs_of.pop(0)
            target_stream: Stream = inputs.hidden
            if place == 0:
                quantized_stream = store.copy(target_stream)
            else:
                quantized_stream = _behind_quantized(
                    model, result, recipe, attention_args, stage, samples, place, store
                )
            batch = recipe.batch_size if _shared(inputs, ranks) else 1
        began = time.perf_counter()
        with held(residence, path, device) as block:
            check_finite(block, path)
            run = BlockCalls(block, index, inputs, device, batch, ranks)
            view = BlockView(place, path, block, run.call_one, target_stream, quantized_stream)
            watcher.block_begins(view)
            restored = journal.restore(place, block) if journal.finished(place) else None
            untouched = present.blocks[place] if present and place not in present.relearned else None
            if restored is not None or untouched is not None:
                if restored is not None and recipe.tuning_epochs:
                    again = frozen_again(block, path, equivalences, restored[0], recipe, storage_dtype)
                    result.frozen.append(again.cpu())
                _, flat = run.advance_full_precision(target_stream)
                result.flat_inputs |= {f"{path}.{name}" for name in flat}
                _replace(block, restored[1] if restored is not None else untouched)  # type: ignore[arg-type]
                if restored is not None:
                    _keep_input_scales(block, restored[0].input_scales)
                elif present is not None and present.input_scales:
                    _keep_input_scales(block, present.input_scales[place])
                with quantized_activations(
                    block, linear_input_args(block, scheme.inputs, recipe, flat), attention_args
                ):
                    run.advance(quantized_stream, target_stream)
                watcher.block_ends(view)
                if restored is not None:
                    result.add(path, restored[0], residence.keeps)
                    watcher.block_done(restored[0].record)
                continue
            own_targets = run.outputs(quantized_stream, store) if recipe.two_branch else None
            statistics, flat = run.advance_full_precision(target_stream)
            if given_statistics is not None:
                statistics = {name: _moved(value, device) for name, value in given_statistics[place].items()}
            fixed, start, slots = begin(block, path, place, equivalences, statistics, recipe, storage_dtype)
            if start_from is not None:
                if len(start_from) != len(paths):
                    raise UsageError(f"saved parameters of {len(start_from)} blocks for a model of {len(paths)}")
                start = _checked_start(start, start_from[place], place, device)
            input_args = linear_input_args(block, scheme.inputs, recipe, flat)
            with quantized_activations(block, input_args, attention_args), kernels.using(recipe.kernels):
                targets = [target_stream] if own_targets is None else [target_stream, own_targets]
                learned = solve(run, fixed, start, quantized_stream, targets, recipe, graphs, place, watcher.epoch_done)
                if present is not None:
                    now = run.fixed_function(present.blocks[place], quantized_stream, targets)
                    learned = or_present(learned, now, len(everything), batch, recipe, ranks)
                frozen = freeze(fixed, learned.learnables)
                if scheme.has_static_inputs:
                    frozen = replace(frozen, input_scales=run.input_scales(quantized_stream, frozen))
            if learned.outcome == "kept present":
                assert present is not None
                _replace(block, present.blocks[place])
                _keep_input_scales(block, present.input_scales[place] if present.input_scales else {})
            else:
                check_fits(frozen, path, storage_dtype)
                watcher.block_decided(
                    view, Decided(fixed, start, learned.learnables, frozen, input_args, attention_args)
                )
                _replace(block, frozen.parameters(next(block.parameters()).dtype))
                _keep_input_scales(block, frozen.input_scales)
            with quantized_activations(block, input_args, attention_args):
                cosine = run.advance(quantized_stream, target_stream)
            watcher.block_ends(view)
            record = BlockRecord(
                place,
                learned.initial_loss,
                learned.final_loss,
                learned.outcome,
                learned.epoch_losses,
                learned.recoveries,
                time.perf_counter() - began,
                cosine,
                learned.epochs_left,
            )
            finished = FinishedBlock(
                {name: tensor.cpu() for name, tensor in learned.learnables.items()},
                {name: _moved(value, torch.device("cpu")) for name, value in statistics.items()},
                record,
                tuple(sorted(flat)),
                tuple(slots),
                {name: scale.clone() for name, scale in frozen.input_scales.items()},  # files hold no tensor twice
            )
            result.add(path, finished, residence.keeps)
            if learned.outcome != "kept present":
                journal.block_done(place, path, block, finished, frozen)
                if recipe.tuning_epochs or not journal.keeps_frozen:
                    result.frozen.append(frozen.cpu())
        watcher.block_done(record)
    if recipe.tuning_epochs:
        del quantized_stream
        whole = Whole(model, result.block_paths, result.frozen, storage_dtype, device)
        with ExitStack() as quantized:
            _quantize_activations(quantized, model, result, recipe, attention_args, len(paths))
            result.frozen, result.tuning = tune(whole, samples, target_stream, recipe, watcher.tuned, ranks)
    result.outside = round_outside(model, recipe, everything[0], storage_dtype)
    return result


def gather_statistics(
    model: nn.Module,
    family: Family | MultimodalFamily,
    samples: Sequence[dict[str, Any]],
    device: torch.device,
) -> list[dict[str, ChannelStatistics]]:
    """Statistics of every block's linear inputs in full precision; nothing is quantized."""
    result = []
    for stage in family.stages(model):
        blocks = stage.blocks(model)
        inputs = capture(model, blocks, samples)
        for index, block in enumerate(blocks):
            check_finite(block, f"{stage.path}.{index}")
            with held(Residence(model), f"{stage.path}.{index}", device):
                statistics, _ = BlockCalls(block, index, inputs, device, 1).advance_full_precision(inputs.hidden)
            result.append({name: _moved(value, torch.device("cpu")) for name, value in statistics.items()})
    return result


def _behind_quantized(
    model: nn.Module,
    result: Reconstruction,
    recipe: Recipe,
    attention_args: QuantizationArgs | None,
    stage: Stage,
    samples: Sequence[dict[str, Any]],
    done: int,
    store: ActivationStore,
) -> Stream:
    """What `stage` receives from the `done` blocks quantized so far, their activations quantized too."""
    with ExitStack() as quantized:
        _quantize_activations(quantized, model, result, recipe, attention_args, done)
        return capture(model, stage.blocks(model), samples, store.stream).hidden


def _quantize_activations(
    quantized: ExitStack,
    model: nn.Module,
    result: Reconstruction,
    recipe: Recipe,
    attention_args: QuantizationArgs | None,
    done: int,
) -> None:
    """Until `quantized` is left, the first `done` blocks run with quantized activations."""
    for path in result.block_paths[:done]:
        block = model.get_submodule(path)
        inputs = linear_input_args(block, recipe.scheme.inputs, recipe, flat_inputs_within(result, path))
        quantized.enter_context(quantized_activations(block, inputs, attention_args))


def _shared(inputs: BlockInputs, ranks: Ranks) -> bool:
    """Whether all ranks' samples may be batched together."""
    if ranks.alone:
        return inputs.shared()
    mine = inputs.fingerprint()
    return ranks.all(inputs.shared() and ranks.text(mine) == mine)


def flat_inputs_within(result: Reconstruction, path: str) -> set[str]:
    """Names, within the block at `path`, of the linears that see (tokens, width)."""
    return {name.removeprefix(f"{path}.") for name in result.flat_inputs if name.startswith(f"{path}.")}


def _moved(statistics: ChannelStatistics, device: torch.device) -> ChannelStatistics:
    absmax, midpoint = statistics.absmax, statistics.midpoint
    return ChannelStatistics(
        None if absmax is None else absmax.to(device), None if midpoint is None else midpoint.to(device)
    )


@torch.no_grad()
def _replace(block: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give `block` the parameters `values`; biases that it lacks are added."""
    add_bias_slots(
        block, missing_biases(block, [name.removesuffix(".bias") for name in values if name.endswith(".bias")])
    )
    parameters = dict(block.named_parameters())
    for name, tensor in values.items():
        parameters[name].copy_(tensor)


def _keep_input_scales(block: nn.Module, scales: Mapping[str, Tensor]) -> None:
    """From now on inputs of `block`'s linears are quantized with these scales (FrozenBlock.input_scales)."""
    for name, scale in scales.items():
        set_whole(block.get_submodule(name), scale)


def _checked_start(start: Learnables, given: Learnables, index: int, device: torch.device) -> Learnables:
    """`given` in place of `start`, when it is the same learnables of the same shapes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in start.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in given.items()}:
        odd = sorted(shapes.keys() ^ given.keys()) or [name for name in shapes if shapes[name] != given[name].shape]
        raise UsageError(
            f"the saved parameters of block {index} do not fit this model and recipe ({odd[0]}, …); "
            f"use the options that they were learned with"
        )
    return {name: given[name].to(device) for name in start}
