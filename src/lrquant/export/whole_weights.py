"""Blocks whose weights must stay whole in a checkpoint, because transformers cannot load them packed."""

from collections.abc import Sequence

from torch import nn

from lrquant.architectures.targets import linears_of
from lrquant.errors import UsageError
from lrquant.export.skeleton import fills_weights
from lrquant.formats import Scheme
from lrquant.formats.layout import packs_numbers

# Parts of transformers whose blocks fill their weights in some of the releases that are to read a checkpoint, if not in
# this one: 5.20 to 5.23.
_FILLED_WEIGHTS = (".clip.", ".siglip.")
_NEEDS_WHOLE: dict[type[nn.Module], bool] = {}  # by class, tried once (skeleton.fills_weights)


def needs_whole_weights(model: nn.Module, path: str) -> bool:
    """Whether transformers cannot load the block at `path` of `model` with packed weights (see formats.layout)."""
    kind = type(model.get_submodule(path))
    if any(part in kind.__module__ for part in _FILLED_WEIGHTS):
        return True
    if kind not in _NEEDS_WHOLE:
        _NEEDS_WHOLE[kind] = fills_weights(model, path, tuple(linears_of(model.get_submodule(path))))
    return _NEEDS_WHOLE[kind]


def quantized_in(model: nn.Module, path: str, scheme: Scheme) -> dict[str, nn.Linear]:
    """The quantized linears of the block at `path`, by their full names."""
    return scheme.chosen({f"{path}.{name}": linear for name, linear in linears_of(model.get_submodule(path)).items()})


def check_layout(model: nn.Module, paths: Sequence[str], scheme: Scheme) -> None:
    """Raise when no checkpoint can hold the blocks at `paths` in `scheme`."""
    packed = [path for path in paths if packs_numbers(scheme) and quantized_in(model, path, scheme)]
    path = next((path for path in packed if needs_whole_weights(model, path)), None)
    if path is not None:
        name = type(model.get_submodule(path)).__name__
        raise UsageError(
            f"{name}: transformers cannot load its weights packed while inputs are quantized; "
            "take a weight-only format, whose name ends in a16, or integers"
        )
