"""Discovery for models without a family file: towers, lists of blocks, and the transformations of each block.

Towers come from transformers (`get_decoder`, `get_encoder`). Blocks are the list in a tower whose members contain
linears. One traced call of a block suggests transformations (candidates.py), which are verified before they are used
(proof.py), once for every kind of block, because hybrids and mixtures of experts have several kinds in one list.
"""

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from lrquant.architectures.candidates import candidates
from lrquant.architectures.every_expert import for_every_expert
from lrquant.architectures.probe import Call, Probe, calls_of, picture_inputs, text_inputs
from lrquant.architectures.proof import proven
from lrquant.architectures.targets import is_linear
from lrquant.errors import UsageError
from lrquant.transforms import Equivalence

TOKENS = 9  # of a call: enough for heads, windows and convolutions to differ
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "depths")


def check_one_chain(config: Any) -> None:
    """Raise for a model with an encoder and a decoder.

    Raises:
        UsageError: with the model's type.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"model type {config.model_type!r} is not supported: it has an encoder and a decoder, and "
            f"lrquant quantizes a single sequence of blocks"
        )


def language_tower(model: Any) -> str:
    """The path of the part of `model` that reads text, as transformers finds it; empty: all of it.

    Raises:
        UsageError: an encoder with a decoder behind it.
    """
    check_one_chain(model.config)
    path = _path_of(model, model.get_decoder()) if hasattr(model, "get_decoder") else ""
    return path if _lists(model.get_submodule(path)) else ""  # a head may be called a decoder


def vision_tower(model: Any) -> str | None:
    """The path of the part of `model` that reads pictures; None: it has none, or is one itself."""
    tower = model.get_encoder("image") if hasattr(model, "get_encoder") else model
    path = _path_of(model, tower)
    return path if path and path != language_tower(model) else None


def _path_of(model: nn.Module, part: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is part), "")


def blocks_in(model: Any, tower: str, sees: bool) -> "Blocks":
    """The list of blocks in the tower at path `tower`; `sees`: it takes pictures.

    Raises:
        UsageError: there is none, or several that may be it.
    """
    top = model.get_submodule(tower)
    lists = _lists(top)
    outermost = {name for name in lists if not any(name.startswith(f"{other}.") for other in lists)}
    if len(outermost) > 1:
        config = getattr(top, "config", model.config)
        lengths = {getattr(config, name, None) for name in _COUNTS}
        outermost = {name for name in outermost if len(lists[name]) in lengths} or outermost
        sizes = {name: sum(parameter.numel() for parameter in lists[name].parameters()) for name in outermost}
        largest = max(sizes, key=sizes.__getitem__)
        if all(sizes[largest] > 2 * size for name, size in sizes.items() if name != largest):
            outermost = {largest}  # beside mergers, adapters and the like
    if len(outermost) != 1:
        found = ", ".join(sorted(outermost)) or "none"
        raise UsageError(
            f"model type {model.config.model_type!r} is not known, and its blocks cannot be found in "
            f"{tower or 'the model'} (lists of blocks: {found})"
        )
    (path,) = outermost
    return Blocks(model, f"{tower}.{path}" if tower else path, tower, sees)


def _lists(tower: nn.Module) -> dict[str, nn.ModuleList]:
    return {name: module for name, module in tower.named_modules() if _may_be_blocks(module)}  # type: ignore[misc]


def _may_be_blocks(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.ModuleList)
        and len(module) > 0
        and any(map(is_linear, module.modules()))
        and not is_linear(module[0])
    )


@dataclass
class Found:
    """The results for the blocks in one list: the transformations of each, and what could not be analysed."""

    equivalences: list[tuple[Equivalence, ...]]
    not_understood: dict[str, str] = field(default_factory=dict)  # class of a block → why


_found: WeakKeyDictionary[Any, dict[str, Found]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Blocks:
    """A list of blocks in a tower, analysed on first access."""

    model: Any
    path: str
    tower: str
    sees: bool  # whether the tower takes pictures

    def equivalences(self, index: int) -> tuple[Equivalence, ...]:
        return self.found().equivalences[index]

    def found(self) -> Found:
        known = _found.setdefault(self.model, {})
        if self.path not in known:
            known[self.path] = self._look()
        return known[self.path]

    def _look(self) -> Found:
        blocks = list(self.model.get_submodule(self.path).children())
        found = Found([()] * len(blocks))
        known: dict[Any, tuple[Equivalence, ...]] = {}
        try:
            calls = self._calls()
        except Exception as error:  # code that was never seen may raise anything
            calls, found.not_understood = [], dict.fromkeys((type(b).__name__ for b in blocks), _first_line(error))
        for index, call in enumerate(calls):
            kind = _kind(blocks[index], index)
            if kind not in known:
                try:
                    known[kind] = discover(blocks[index], call)
                except Exception as error:
                    known[kind] = ()
                    found.not_understood[type(blocks[index]).__name__] = _first_line(error)
            found.equivalences[index] = known[kind]
        return found

    def _calls(self) -> list[Call]:
        tower, below, forms = self.model, self.path, text_inputs(self.model, TOKENS)
        if self.sees:
            tower = self.model.get_submodule(self.tower)
            below = self.path.removeprefix(f"{self.tower}.") if self.tower else self.path
            forms = picture_inputs(getattr(tower, "config", self.model.config))
        problem: Exception = LookupError("nothing to call it with")
        for inputs in forms:
            try:
                return calls_of(tower, below, inputs)
            except Exception as error:
                problem = error
        raise problem


def discover(block: nn.Module, call: Call) -> tuple[Equivalence, ...]:
    """The exact transformations of `block`, found on random values; `call` has the arguments that its model passes."""
    training = block.training
    block.eval()
    try:
        probe = Probe(block, call)
        return for_every_expert(block, proven(probe, candidates(probe.trace())))
    finally:
        block.train(training)


def _kind(block: nn.Module, index: int) -> Any:
    """Equal for blocks that run the same code on tensors of the same shapes."""
    settings = tuple(
        (name, type(module), key, value)
        for name, module in block.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and key != "training" and not (value == index and "id" in key)
    )
    return type(block), settings, tuple((name, tensor.shape) for name, tensor in block.named_parameters())


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
