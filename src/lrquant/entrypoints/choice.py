"""Patterns of modules in a recipe: each has to fit something, and something has to be left to quantize."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from torch import nn

from lrquant.errors import UsageError
from lrquant.formats.schemes import fits
from lrquant.passes.non_block_modules import chosen_modules
from lrquant.recipe import Recipe

NEAREST = 3  # names that an error suggests


def check_choice(model: Any, linears: Mapping[str, nn.Linear], recipe: Recipe) -> None:
    """Raise where a pattern of `recipe` fits nothing of `model`, whose blocks have `linears` by full name.

    `ignore` may fit any module, such as a head, which is not quantized anyway; `only` and `formats` have to fit
    something that is.

    Raises:
        UsageError: it names the pattern and the nearest names, or says that nothing would be quantized.
    """
    everything = [*linears, *chosen_modules(model, recipe.changed(ignore=(), only=()))]
    quantized = recipe.scheme.chosen(dict.fromkeys(everything))
    modules = [name for name, _ in model.named_modules()]
    for field, names in (("ignore", [*modules, *linears]), ("only", everything)):
        for pattern in getattr(recipe, field):
            if not _fits_any(pattern, names):
                raise UsageError(f"{field} = {pattern!r}: no module of this model has such a name; "
                                 f"{_nearest(pattern, everything)}")  # fmt: skip
    for pattern in recipe.formats:
        if not _fits_any(pattern, quantized):
            left = "is quantized" if _fits_any(pattern, everything) else "has such a name"
            raise UsageError(f"formats of {pattern!r}: no linear of this model {left}; {_nearest(pattern, quantized)}")
    if not quantized:
        raise UsageError("ignore and only leave every linear in floating point: nothing would be quantized")


def _fits_any(pattern: str, names: Iterable[str]) -> bool:
    return any(fits(pattern, name) for name in names)


def _nearest(pattern: str, linears: Iterable[str]) -> str:
    """Patterns near to `pattern` that do fit."""
    names = list(linears)
    if _fits_any(f"*{pattern}*", names):
        near = [f"*.{pattern}"] if _fits_any(f"*.{pattern}", names) else [f"*{pattern}*"]
    else:
        parents = {name.rpartition(".")[0] for name in names}
        known = dict.fromkeys(f"*.{name.rpartition('.')[2]}" for name in (*names, *sorted(parents)))
        near = get_close_matches(pattern, [*known, *names], NEAREST, cutoff=0.5) or list(known)[: 2 * NEAREST]
    return f"nearest: {', '.join(near)}"
