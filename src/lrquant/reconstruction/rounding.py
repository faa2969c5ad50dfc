"""Learn a block with the recipe's way of rounding weights.

nearest   learn
learned   learn, with an offset for every weight
gptq      learn; then offsets that compensate (formats/gptq.py), from the learned block's inputs
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrquant.losses import no_worse
from lrquant.recipe import Recipe
from lrquant.reconstruction.block_forward import BlockForward
from lrquant.reconstruction.block_optimizer import Learned, learn, measure, reported
from lrquant.reconstruction.block_parameters import gptq_offsets, quantized_parameters
from lrquant.reconstruction.compiled_block import CompiledBlocks
from lrquant.reconstruction.fixed_parameters import BlockParameters
from lrquant.reconstruction.learnables import Learnables


@dataclass(frozen=True)
class Problem:
    """What a block is to learn: learnables that bring its outputs on `stream` close to `targets`."""

    index: int  # of the block in the model; it seeds the order of samples
    fixed: BlockParameters
    start: Learnables
    stream: Sequence[Tensor]
    targets: Sequence[Sequence[Tensor]]  # per branch of the loss


def solve(
    forward: BlockForward,
    problem: Problem,
    *,
    recipe: Recipe,
    compiled: CompiledBlocks,
    on_epoch: Callable[[int, int, float], None],
) -> Learned:
    """The learned block; `on_epoch(block, epoch, loss)` is called after every epoch."""
    fixed, index = problem.fixed, problem.index
    graph = compiled.of(forward.block, fixed) if forward.inputs.shared() else None
    loss = forward.forward_function(fixed, problem.stream, problem.targets, recipe=recipe, graph=graph)
    learned = learn(
        loss,
        problem.start,
        forward.batches,
        recipe=recipe,
        seed=recipe.seed + index,
        on_epoch=lambda epoch, loss: on_epoch(index, epoch, loss),
    )
    if recipe.rounding != "gptq" or fixed.format is None:
        return learned
    compensated = _compensated(forward, fixed, learned.learnables, stream=problem.stream)
    after = measure(loss, compensated, forward.batches)
    if not no_worse(after, learned.final_terms):
        return learned
    return replace(learned, learnables=compensated, final_loss=reported(after, recipe.loss), final_terms=after)


@torch.no_grad()
def _compensated(
    forward: BlockForward, fixed: BlockParameters, learnables: Learnables, *, stream: Sequence[Tensor]
) -> Learnables:
    """`learnables` with GPTQ's offsets for the inputs that the block, as learned, gives its linears."""
    present = quantized_parameters(fixed, learnables, next(forward.block.parameters()).dtype)
    return learnables | gptq_offsets(fixed, learnables, forward.second_moments(stream, present))
