"""What a model family declares, the table of families, and inspection of unknown ones.

A family is one short file in `families/` that defines `FAMILY`; dropping a file in is all it takes.

The engine works on *stages*: lists of blocks that hand their hidden states on unchanged. A language model or
a ViT is one stage; Swin is one per resolution, with a merging of patches between them; a multimodal model is
the stages of its towers, in the order that data flows.
"""

import importlib
import logging
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import nn

from lrquant.errors import UsageError
from lrquant.transforms import Equivalence

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResidualStream:
    """Who writes to the hidden states that a decoder's blocks hand on, so that they can be rotated.

    Who reads them is known: the linears behind a block's norms (`NormToLinears`), and the head behind the last norm.
    Names are relative to a block (`writers`, `down`) or to what holds the list of blocks.
    """

    writers: tuple[str, ...]  # linears of a block whose outputs are added to the stream
    down: str  # the one of them that closes the MLP
    embeddings: tuple[str, ...]  # modules whose rows start the stream
    norm: str  # before the head
    why_not: str = ""  # why the stream of this family cannot be rotated


@dataclass(frozen=True)
class Stage:
    """A list of equal blocks inside a model, `path`, and the transformations of each."""

    path: str
    equivalences: Sequence[Equivalence]
    residual: ResidualStream | None = None
    joins: str | None = None  # the linear whose outputs stand among the embeddings: a picture's projector

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.get_submodule(self.path).children())


@dataclass(frozen=True)
class Family:
    """Models that share a block's structure.

    `blocks` is the path of the list of blocks as it stands in a model with a head; where the family's bare
    model is loaded, or is a tower of a larger one, the first part of the path falls away. A `*` in it stands
    for the numbers of successive stages, and then `equivalences` takes the stage's number besides the
    configuration. `equivalences` gives the transformations of a block, with module names relative to it.
    """

    name: str
    model_types: tuple[str, ...]  # as in the configuration's `model_type`
    blocks: str
    equivalences: Callable[..., Sequence[Equivalence]]
    tower: str = "language"
    known: bool = True  # False: found by inspection
    residual: ResidualStream | None = None

    @property
    def towers(self) -> tuple[str, ...]:
        return (self.tower,)

    def stages(self, model: Any, towers: Sequence[str] | None = None) -> list[Stage]:
        """All of `model`'s stages; `towers` may only name the one tower that there is."""
        check_towers(self, towers)
        return self.stages_below(model, "", model.config)

    def stages_below(self, model: nn.Module, root: str, config: Any) -> list[Stage]:
        """The stages of the tower at `root` (empty: the whole model)."""
        top = model.get_submodule(root)
        first, _, rest = self.blocks.partition(".")
        path = self.blocks if hasattr(top, first) else rest
        path = f"{root}.{path}" if root else path
        if "*" not in path:
            return [Stage(path, self.equivalences(config), self.residual)]
        above, _, below = path.partition(".*.")
        count = len(list(model.get_submodule(above).children()))
        return [Stage(f"{above}.{index}.{below}", self.equivalences(config, index)) for index in range(count)]


@dataclass(frozen=True)
class Tower:
    """A tower of a multimodal model: where it is, its part of the configuration, its family (None: found by type)."""

    name: str
    path: str
    config: str
    family: Family | None = None


@dataclass(frozen=True)
class MultimodalFamily:
    """Models made of towers, each of a family of its own; `parts` in the order that data flows."""

    name: str
    model_types: tuple[str, ...]
    parts: tuple[Tower, ...]
    projector: str | None = None  # the linear whose outputs stand among the language model's embeddings

    @property
    def towers(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.parts)

    def stages(self, model: Any, towers: Sequence[str] | None = None) -> list[Stage]:
        """The stages of `towers` (None: the language tower), in the order that data flows.

        Raises:
            UsageError: no such tower, or one of a type that no family knows.
        """
        check_towers(self, towers)
        stages = []
        for part in self.parts:
            if part.name not in (towers or ("language",)):
                continue
            config = getattr(model.config, part.config)
            family = part.family or _families().get(config.model_type)
            if not isinstance(family, Family):
                raise UsageError(
                    f"the {part.name} tower is of type {config.model_type!r}, which is not known; known are "
                    f"{', '.join(family_names())}"
                )
            below = family.stages_below(model, part.path, config)
            for stage in below:
                residual = stage.residual
                if residual is not None and self.projector is None:
                    residual = replace(residual, why_not=residual.why_not or "where pictures join it is not declared")
                stages.append(replace(stage, residual=residual, joins=self.projector))
        return stages


def check_towers(family: Family | MultimodalFamily, towers: Sequence[str] | None) -> None:
    unknown = [tower for tower in towers or () if tower not in family.towers]
    if unknown:
        raise UsageError(f"towers {unknown[0]!r}: a {family.name} model has {', '.join(family.towers)}")


@cache
def _families() -> dict[str, Family | MultimodalFamily]:
    package = importlib.import_module("lrquant.architectures.families")
    table: dict[str, Family | MultimodalFamily] = {}
    for module in pkgutil.iter_modules(package.__path__):
        family: Family | MultimodalFamily = importlib.import_module(f"{package.__name__}.{module.name}").FAMILY
        table |= dict.fromkeys(family.model_types, family)
    return table


def family_names() -> tuple[str, ...]:
    """The `model_type`s that are known, in alphabetical order."""
    return tuple(sorted(_families()))


def family_of(model: nn.Module) -> Family | MultimodalFamily:
    """The family of a transformers model, or one found by inspection, which has no transformations.

    Raises:
        UsageError: the model has no single list of equal blocks with linears in them.
    """
    model_type = str(model.config.model_type)  # type: ignore[union-attr]
    return _families().get(model_type) or _inspect(model, model_type)


def _inspect(model: nn.Module, model_type: str) -> Family:
    """The longest list of modules of one class that hold linears is taken for the blocks."""
    candidates = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and len({type(block) for block in module}) == 1
        and any(isinstance(part, nn.Linear) for part in module[0].modules())
    }
    outermost = {
        name: module
        for name, module in candidates.items()
        if not any(name.startswith(f"{other}.") for other in candidates)
    }
    if len(outermost) != 1:
        found = ", ".join(outermost) or "none"
        raise UsageError(
            f"model type {model_type!r} is not known, and its blocks cannot be found by inspection "
            f"(lists of equal blocks: {found}); known are {', '.join(family_names())}"
        )
    (path,) = outermost
    log.warning(
        "Model type %r is not known: its blocks were found at %s; weight clipping only, no smoothing.", model_type, path
    )
    return Family(model_type, (model_type,), path, lambda config: (), known=False)
