"""The Pass class: one step of a run, which a recipe can enable."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lrquant.loading.original import Original
from lrquant.recipe import Recipe
from lrquant.reconstruction.run import Run


def _nothing_to_resolve(original: Original, recipe: Recipe) -> dict[str, Any]:
    return {}


def _nothing_to_check(original: Original, recipe: Recipe) -> None:
    pass


@dataclass(frozen=True)
class Pass:
    """One step of a run.

    Args:
        name: as passed to callbacks.
        carry_out: does the work: changes the run's model, and records the outcome in `run.result`.
        applies: whether a resolved recipe needs it.
        resolve: recipe fields that it decides from the model before anything is done (`auto` becomes a value).
        check: raises `UsageError` if it does not work for the model, before anything is changed.
        needs_model: whether all blocks must be in memory at once.
        needs_blocks: whether it needs what the block loop otherwise releases: the frozen parameters of all blocks
            (`run.result.frozen`) and the full-precision stream (`run.full_precision`).
    """

    name: str
    carry_out: Callable[[Run], None]
    applies: Callable[[Recipe], bool] = lambda recipe: True
    resolve: Callable[[Original, Recipe], dict[str, Any]] = _nothing_to_resolve
    check: Callable[[Original, Recipe], None] = _nothing_to_check
    needs_model: bool = False
    needs_blocks: bool = False
