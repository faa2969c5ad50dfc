"""From a block's initial learnables to its final ones, by the recipe's way of rounding weights.

nearest        learn
learned        learn, with an offset for every weight
gptq           learn; then offsets that compensate (formats/compensation.py), from the learned block's inputs
gptq+learned   learn for the first part of the epochs; compensate; then learn on, offsets included
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lrquant.recipe import Recipe
from lrquant.reconstruction.calls import BlockCalls
from lrquant.reconstruction.graphs import Graphs
from lrquant.reconstruction.learning import Learnables, Learned, learn, measure
from lrquant.reconstruction.parameters import BlockParameters, compensated_offsets, quantized_parameters

FIRST_PART = 0.25  # of the epochs, before offsets are there to be learned


def solve(
    run: BlockCalls,
    fixed: BlockParameters,
    start: Learnables,
    stream: Sequence[Tensor],
    targets: Sequence[Sequence[Tensor]],
    recipe: Recipe,
    graphs: Graphs,
    place: int,
    told: Callable[[int, int, float], None],
) -> Learned:
    """The learned block; `told(place, epoch, loss)` hears of every epoch."""
    graph = graphs.of(run.block, fixed) if run.inputs.shared() else None
    forward = run.forward_function(fixed, stream, targets, recipe, graph)
    samples, seed = len(stream), recipe.seed + place

    def learned_from(initial: Learnables, part: Recipe, done: int) -> Learned:
        return learn(
            forward, initial, samples, run.batch, part, seed + done, lambda epoch, loss: told(place, done + epoch, loss)
        )

    if recipe.rounding in ("nearest", "learned") or fixed.grid is None:
        return learned_from(start, recipe, 0)
    first_epochs = recipe.epochs if recipe.rounding == "gptq" else round(recipe.epochs * FIRST_PART)
    first = learned_from(start, recipe.changed(epochs=first_epochs, rounding="nearest"), 0)
    compensated = _compensated(run, fixed, first.learnables, stream)
    if recipe.rounding == "gptq":
        after = measure(forward, compensated, samples, run.batch, recipe.loss == "mse+nlc")
        return replace(first, learnables=compensated, final_loss=after) if after <= first.final_loss else first
    second = learned_from(compensated, recipe.changed(epochs=recipe.epochs - first_epochs), first_epochs)
    return replace(
        second,
        initial_loss=first.initial_loss,
        epoch_losses=first.epoch_losses + second.epoch_losses,
        recoveries=first.recoveries + second.recoveries,
        epochs_left=first.epochs_left + second.epochs_left,
    )


@torch.no_grad()
def _compensated(
    run: BlockCalls, fixed: BlockParameters, learnables: Learnables, stream: Sequence[Tensor]
) -> Learnables:
    """`learnables` with GPTQ's offsets for the inputs that the block, as learned, gives its linears."""
    present = quantized_parameters(fixed, learnables, next(run.block.parameters()).dtype)
    return learnables | compensated_offsets(fixed, learnables, run.second_moments(stream, present))
