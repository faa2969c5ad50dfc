"""The sequence of passes of a recipe, and its execution.

    rotation            folds Hadamard or random rotations into the weights
    mixed precision     finds how many bits each linear gets, under a size budget
    blocks              reconstructs one block after another
    end-to-end tuning   learns the whole model's scales and norms for its logits
    non-block modules   rounds what lies outside the blocks

A new pass is one file with a `Pass` and a row here (docs/passes.md).
"""

from collections.abc import Sequence
from typing import Any

from lrquant.loading.original import Original
from lrquant.passes.definition import Pass
from lrquant.passes.end_to_end import END_TO_END
from lrquant.passes.mixed_precision import MIXED_PRECISION
from lrquant.passes.non_block_modules import NON_BLOCK_MODULES
from lrquant.passes.rotation import ROTATION
from lrquant.recipe import Recipe
from lrquant.reconstruction.engine import reconstruct_blocks
from lrquant.reconstruction.result import Reconstruction
from lrquant.reconstruction.run import Run

BLOCKS = Pass("blocks", reconstruct_blocks)
PASSES: tuple[Pass, ...] = (ROTATION, MIXED_PRECISION, BLOCKS, END_TO_END, NON_BLOCK_MODULES)


def pipeline(recipe: Recipe) -> tuple[Pass, ...]:
    """The passes that `recipe` needs, in order."""
    return tuple(each for each in PASSES if each.applies(recipe))


def needs_model(recipe: Recipe) -> bool:
    """Whether a pass of `recipe` needs all blocks in memory at once."""
    return any(each.needs_model for each in pipeline(recipe))


def needs_blocks(recipe: Recipe) -> bool:
    """Whether a pass of `recipe` needs all blocks' frozen values, and hence the quantized model in memory."""
    return any(each.needs_blocks for each in pipeline(recipe))


def resolved_by_passes(original: Original, recipe: Recipe) -> dict[str, Any]:
    """The recipe's fields that passes decide from the model."""
    return {name: value for each in pipeline(recipe) for name, value in each.resolve(original, recipe).items()}


def check_passes(original: Original, recipe: Recipe) -> None:
    """Raise if a pass of `recipe` does not work for this model.

    Raises:
        UsageError: one line that names the option and the remedy.
    """
    for each in pipeline(recipe):
        each.check(original, recipe)


def carry_out(run: Run, passes: Sequence[Pass] | None = None) -> Reconstruction:
    """Carry out `passes`, by default those of the run's recipe; returns their results."""
    for each in pipeline(run.recipe) if passes is None else passes:
        run.callback.pass_begins(each.name)
        each.carry_out(run)
        run.callback.pass_ends(each.name)
    return run.result
