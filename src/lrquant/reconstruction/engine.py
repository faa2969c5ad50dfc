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
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import nn

from lrquant.architectures import Family, MultimodalFamily, Stage
from lrquant.calibration.activation_cache import ActivationStore, Stream
from lrquant.calibration.capture import BlockInputs, capture
from lrquant.errors import UsageError
from lrquant.formats.activation_quant import quantized_activations, route_attention
from lrquant.loading.block_source import BlockSource, held
from lrquant.passes.end_to_end import Whole, tune
from lrquant.passes.mixed_precision import BitAllocation
from lrquant.passes.non_block_modules import chosen_modules, round_outside
from lrquant.passes.rotation import rotate, settled
from lrquant.recipe import Recipe
from lrquant.reconstruction.block_forward import BlockForward
from lrquant.reconstruction.block_preparation import (
    check_finite,
    check_group_size,
    enabled_equivalences,
    linear_input_args,
)
from lrquant.reconstruction.block_reconstruction import BlockReconstruction, Run
from lrquant.reconstruction.callbacks import Callback
from lrquant.reconstruction.compiled_block import CompiledBlocks
from lrquant.reconstruction.initial_state import frozen_again
from lrquant.reconstruction.journal import Journal
from lrquant.reconstruction.learnables import Learnables
from lrquant.reconstruction.result import Present, Reconstruction
from lrquant.runtime.distributed import ALONE, Ranks
from lrquant.runtime.execution import settle
from lrquant.transforms.statistics import ChannelStatistics


def reconstruct(
    model: nn.Module,
    family: Family | MultimodalFamily,
    recipe: Recipe,
    samples: Sequence[dict[str, Any]],
    device: torch.device,
    storage_dtype: torch.dtype,
    callback: Callback,
    given_statistics: Sequence[dict[str, ChannelStatistics]] | None = None,
    start_from: Sequence[Learnables] | None = None,
    present: Present | None = None,
    journal: Journal | None = None,
    block_source: BlockSource | None = None,
    store: ActivationStore | None = None,
    ranks: Ranks = ALONE,
) -> Reconstruction:
    """Quantize `model`'s blocks in place. `samples` are keyword arguments of single-sample calls.

    `start_from` holds learnables of an earlier run, one mapping per block, to start from. With `present`, only
    some blocks are learned again: the others run as they are there, and leave no entry in the result's lists.
    `journal` knows of blocks that an earlier run finished, `block_source` where blocks come from, `store` where the
    streams live; left out, nothing is remembered and everything is in host memory. Every one of `ranks` is given all
    samples and works on its own; all come to the same blocks.
    """
    everything, samples = samples, ranks.share(samples)
    journal, block_source = journal or Journal(), block_source or BlockSource(model)
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
    recipe = settled(model, stages, recipe)
    result = Reconstruction(recipe, paths, attention_quantized=attention_args is not None)
    result.rotated = rotate(model, stages, recipe, block_source, storage_dtype)
    if recipe.target_bits is not None and recipe.layer_bits is None:
        told = callback.measured
        allocation = BitAllocation(model, family, recipe, everything, device, storage_dtype, block_source, told, ranks)
        recipe = recipe.changed(layer_bits=journal.bits(allocation.layer_bits))
    journal.open(len(paths))
    block_source.take(paths[places.index((stages[-1], 0))])  # one block shows what blocks return
    inputs_of = [capture(model, stage.blocks(model), samples, store.stream) for stage in stages]
    blocks = [model.get_submodule(path) for path in paths]
    recipe = settle(recipe, device, blocks, len(everything), inputs_of[0].hidden[0].shape[-2])
    recipe = result.recipe = Recipe.parse(json.loads(ranks.text(json.dumps(recipe.model_dump(mode="json")))))
    if start_from is not None and len(start_from) != len(paths):
        raise UsageError(f"saved parameters of {len(start_from)} blocks for a model of {len(paths)}")
    graphs, total = CompiledBlocks(recipe, device), len(everything)
    run = Run(
        recipe,
        device,
        storage_dtype,
        attention_args,
        store,
        graphs,
        callback,
        ranks,
        total,
        given_statistics,
        start_from,
        present,
    )
    callback.started(len(paths), recipe.epochs if recipe.learns else 0)
    for place, ((stage, index), path) in enumerate(zip(places, paths, strict=True)):
        if not block_source.keeps and all(journal.finished(later) for later in range(place, len(paths))):
            result.add(path, journal.summary(place), with_offsets=False)  # nothing is left that needs its outputs
            callback.block_done(result.records[-1])
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
        with held(block_source, path, device) as block:
            check_finite(block, path)
            calls = BlockForward(block, index, inputs, device, batch, ranks)
            turn = BlockReconstruction(place, path, block, equivalences, calls, target_stream, quantized_stream, run)
            if present is not None and place not in present.relearned:
                flat = turn.pass_through(present.blocks[place], present.scales(place))
                result.flat_inputs |= {f"{path}.{name}" for name in flat}
                continue
            restored = journal.restore(place, block) if journal.finished(place) else None
            if restored is not None:
                finished, parameters = restored
                if recipe.tuning_epochs:
                    frozen = frozen_again(block, path, equivalences, finished, recipe, storage_dtype)
                turn.pass_through(parameters, finished.input_scales)
            else:
                finished, frozen = turn.learn()
                if finished.record.outcome != "kept present":
                    journal.block_done(place, path, block, finished, frozen)
            if recipe.tuning_epochs or not (journal.keeps_frozen or finished.record.outcome == "kept present"):
                result.frozen.append(frozen.cpu())
            result.add(path, finished, with_offsets=not journal.keeps_frozen)
        callback.block_done(finished.record)
    if recipe.tuning_epochs:
        del quantized_stream
        whole = Whole(model, result.block_paths, result.frozen, storage_dtype, device)
        with ExitStack() as quantized:
            _quantize_activations(quantized, model, result, recipe, attention_args, len(paths))
            result.frozen, result.tuning = tune(whole, samples, target_stream, recipe, callback.tuned, ranks)
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
            with held(BlockSource(model), f"{stage.path}.{index}", device):
                statistics, _ = BlockForward(block, index, inputs, device, 1).advance_full_precision(inputs.hidden)
            result.append({name: value.to(torch.device("cpu")) for name, value in statistics.items()})
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
        inputs = linear_input_args(block, recipe.scheme.inputs, recipe, result.flat_inputs_within(path))
        quantized.enter_context(quantized_activations(block, inputs, attention_args))


def _shared(inputs: BlockInputs, ranks: Ranks) -> bool:
    """Whether all ranks' samples may be batched together."""
    if ranks.alone:
        return inputs.shared()
    mine = inputs.fingerprint()
    return ranks.all(inputs.shared() and ranks.text(mine) == mine)
