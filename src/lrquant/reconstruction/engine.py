"""The block loop: two streams of hidden states through the model, one block on the device at a time.

    provide   x  ← f(x; W), and W' from a provider: learned, restored from the journal, or kept as it is
    advance   x̂ ← f(x̂; W')

A provider that learns (block_reconstruction.py) finds the θ* that minimises loss(f(x̂; W(θ)), f(x; W)), and returns W'
= W(θ*) as integers, scales and zero points. The loop does not depend on that, nor on the passes before and after it
(lrquant.passes). The activation cache holds both streams once; a stream is overwritten sample by sample as it advances.
"""

import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lrquant.formats.activation_quant import quantized_activations, set_static_scale
from lrquant.loading.block_source import held
from lrquant.loading.original import BlockPlace
from lrquant.reconstruction.block_preparation import check_values
from lrquant.reconstruction.block_reconstruction import Learn, restore
from lrquant.reconstruction.journal import FinishedBlock
from lrquant.reconstruction.run import BlockOutcome, BlockTask, Run
from lrquant.reconstruction.streams import Streams
from lrquant.transforms.bias_slots import add_bias_slots, missing_biases


def reconstruct_blocks(run: Run) -> None:
    """Give every block of `run` its quantized parameters, in the order that data flows.

    All ranks call this with all samples. Each works on its own samples, and all get the same blocks.
    """
    recipe, callback = run.recipe, run.callback
    run.journal.open(len(run.places))
    streams = Streams(run)
    callback.started(len(run.places), recipe.epochs if recipe.learns else 0)
    for place in run.places:
        finished: FinishedBlock | None
        if _nobody_needs(run, place):
            finished = run.journal.summary(place.index)
            run.result.add(place.path, finished, with_offsets=False)
        else:
            if place.within == 0:
                streams.enter(place)
            with held(run.block_source, place.path, run.machine.device) as block:
                run.result.zero += check_values(block, place.path)
                finished = _reconstruct(streams.task(place, block))
        if finished is not None:
            callback.block_done(finished.record)
    if run.keeps_blocks:
        run.full_precision = streams.full_precision


def _nobody_needs(run: Run, place: BlockPlace) -> bool:
    """Whether the block at `place` and all blocks after it are finished, and nothing needs their outputs."""
    later = range(place.index, len(run.places))
    return not run.block_source.keeps and all(run.journal.finished(index) for index in later)


def _reconstruct(task: BlockTask) -> FinishedBlock | None:
    """Reconstruct one block: it gets the parameters of the first provider that has some, and both streams advance."""
    began, run, path = time.perf_counter(), task.run, task.place.path
    run.callback.block_begins(task.event)
    answers = (provider(task) for provider in run.providers or (restore, Learn()))
    outcome = next(answer for answer in answers if answer is not None)
    cosine = _advance(task, outcome)
    run.callback.block_ends(task.event)
    finished, frozen = outcome.finished, outcome.frozen
    if finished is None:
        run.result.flat_inputs |= {f"{path}.{name}" for name in outcome.flat_inputs}
        return None
    if outcome.fresh:
        finished.record = replace(finished.record, seconds=time.perf_counter() - began, cosine=cosine)
        if frozen is not None:
            run.journal.block_done(task.place.index, path, task.block, finished, frozen)
    if frozen is not None and (run.keeps_blocks or not run.journal.keeps_frozen):
        run.result.frozen.append(frozen.cpu())
    run.result.add(path, finished, with_offsets=not run.journal.keeps_frozen)
    return finished


def _advance(task: BlockTask, outcome: BlockOutcome) -> float:
    """Give the block its parameters and advance x̂; returns the mean cosine similarity between the streams."""
    _replace(task.block, outcome.parameters)
    for name, scale in outcome.static_scales.items():  # from now on
        set_static_scale(task.block, name, scale)
    input_args = task.run.input_args(task.block, task.place.path, outcome.flat_inputs)
    with quantized_activations(task.block, input_args, task.run.attention_scheme):
        return task.forward.advance(task.quantized, task.full_precision)


@torch.no_grad()
def _replace(block: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give `block` the parameters `values`; biases that it lacks are added."""
    biases = [name.removesuffix(".bias") for name in values if name.endswith(".bias")]
    add_bias_slots(block, missing_biases(block, biases))
    parameters = dict(block.named_parameters())
    for name, tensor in values.items():
        parameters[name].copy_(tensor)
