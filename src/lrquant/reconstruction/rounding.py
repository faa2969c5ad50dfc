"""Learn a block with the recipe's way of rounding weights.

nearest   learn
learned   learn, with an offset for every weight
gptq      learn; then offsets that compensate (formats/gptq.py), from the learned block's inputs
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

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


def solve(
    run: BlockForward,
    fixed: BlockParameters,
    start: Learnables,
    stream: Sequence[Tensor],
    targets: Sequence[Sequence[Tensor]],
    recipe: Recipe,
    graphs: CompiledBlocks,
    place: int,
    told: Callable[[int, int, float], None],
) -> Learned:
    """The learned block; `told(place, epoch, loss)` is called after every epoch."""
    graph = graphs.of(run.block, fixed) if run.inputs.shared() else None
    forward = run.forward_function(fixed, stream, targets, recipe, graph)
    learned = learn(
        forward,
        start,
        run.samples,
        run.batch,
        recipe,
        recipe.seed + place,
        lambda epoch, loss: told(place, epoch, loss),
        run.ranks,
    )
    if recipe.rounding != "gptq" or fixed.format is None:
        return learned
    compensated = _compensated(run, fixed, learned.learnables, stream)
    after = measure(forward, compensated, run.samples, run.batch, run.ranks)
    if not no_worse(after, learned.final_terms):
        return learned
    return replace(learned, learnables=compensated, final_loss=reported(after, recipe.loss), final_terms=after)


@torch.no_grad()
def _compensated(
    run: BlockForward, fixed: BlockParameters, learnables: Learnables, stream: Sequence[Tensor]
) -> Learnables:
    """`learnables` with GPTQ's offsets for the inputs that the block, as learned, gives its linears."""
    present = quantized_parameters(fixed, learnables, next(run.block.parameters()).dtype)
    return learnables | gptq_offsets(fixed, learnables, run.second_moments(stream, present))
