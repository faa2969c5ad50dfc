"""Declarations of model families, their table, and families found by discovery.

A family is one short file in `families/` that defines `FAMILY`; adding a file is enough. Models without one are
analysed (discovery.py).

The engine works on *stages*: lists of blocks, each of which passes its hidden states directly to the next. A language
model or a ViT has one stage. Swin has one per resolution, with patch merging between them. A multimodal model has the
stages of its towers, in the order of the data flow.
"""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import nn

from lrquant.architectures.discovery import Blocks, blocks_in, language_tower, vision_tower
from lrquant.architectures.every_expert import name_in_every_expert
from lrquant.errors import UsageError
from lrquant.transforms import Equivalence


@dataclass(frozen=True)
class ResidualStream:
    """The modules that write to a decoder's residual stream, which rotation needs to know.

    The readers are known: the linears after a block's norms (`NormToLinears`), and the head after the last norm. Names
    are relative to a block (`writers`, `down`) or to the module that contains the list of blocks.
    """

    writers: tuple[str, ...]  # linears of a block whose outputs are added to the stream
    down: str  # the one of them that closes the MLP
    embeddings: tuple[str, ...]  # modules whose rows start the stream
    norm: str  # before the head
    why_not: str = ""  # why the stream of this family cannot be rotated


@dataclass(frozen=True)
class Stage:
    """A list of blocks inside a model, `path`, and the transformations of each."""

    path: str
    equivalences: Sequence[Equivalence]  # of every block, as its family declares them
    residual: ResidualStream | None = None
    joins: str | None = None  # the linear whose outputs stand among the embeddings: a picture's projector
    found: Blocks | None = None  # blocks of any kinds, each with transformations of its own

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.get_submodule(self.path).children())

    def equivalences_of(self, index: int) -> Sequence[Equivalence]:
        """The transformations of the block with this number."""
        return self.equivalences if self.found is None else self.found.equivalences(index)


@dataclass(frozen=True)
class Family:
    """Models that share a block's structure.

    `blocks` is the path of the list of blocks in a model with a head; in a bare model, or a tower of a larger model,
    the path lacks its first part. A `*` in it stands for the index of the stage, and `equivalences` then takes the
    stage's index besides the configuration. `equivalences` returns the transformations of a block, with module names
    relative to it.
    """

    name: str
    model_types: tuple[str, ...]  # as in the configuration's `model_type`
    blocks: str
    equivalences: Callable[..., Sequence[Equivalence]]
    tower: str = "language"
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
            UsageError: no such tower, or one whose blocks cannot be found.
        """
        check_towers(self, towers)
        stages = []
        for part in self.parts:
            if part.name not in (towers or ("language",)):
                continue
            for stage in _stages_of_tower(model, part):
                residual = stage.residual
                if residual is not None and self.projector is None:
                    residual = replace(
                        residual,
                        why_not=residual.why_not or "its family file does not declare where images join the text",
                    )
                stages.append(replace(stage, residual=residual, joins=self.projector))
        return stages


@dataclass(frozen=True)
class FoundFamily:
    """Models of a type without a family file; their towers and blocks are found by discovery."""

    name: str
    parts: tuple[Tower, ...]

    @property
    def towers(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.parts)

    def stages(self, model: Any, towers: Sequence[str] | None = None) -> list[Stage]:
        """The stages of `towers` (None: the language tower, or the only one), in the order that data flows.

        Raises:
            UsageError: no such tower, or one whose blocks cannot be found.
        """
        check_towers(self, towers)
        wanted = towers or (("language",) if "language" in self.towers else self.towers)
        stages = []
        for part in self.parts:
            for stage in _stages_of_tower(model, part) if part.name in wanted else ():
                residual = stage.residual
                if residual is not None and len(self.parts) > 1:
                    residual = replace(
                        residual,
                        why_not=residual.why_not or "its family file does not declare where images join the text",
                    )
                stages.append(replace(stage, residual=residual))
        return stages


def found_notes(model_type: str, stages: Sequence[Stage]) -> list[str]:
    """One sentence for each of `stages` without a family file: what was found, and what could not be analysed."""
    notes = []
    for stage in stages:
        if stage.found is None:
            continue
        found = stage.found.found()
        names = dict.fromkeys(name_in_every_expert(each.name) for own in found.equivalences for each in own)
        what = (
            f"found by analysis and verified: {', '.join(names)}" if names else "none found; weights are only clipped"
        )
        notes.append(f"Model type {model_type!r} has no family file; transformations of {stage.path}: {what}.")
        notes += [
            f"{name} in {stage.path} could not be analysed ({why}): its weights are clipped, not smoothed."
            for name, why in found.not_understood.items()
        ]
    return notes


AnyFamily = Family | MultimodalFamily | FoundFamily


def _stages_of_tower(model: Any, part: Tower) -> list[Stage]:
    """A tower's stages as its family declares them, or as they are found."""
    tower = model.get_submodule(part.path)
    config = getattr(model.config, part.config, None) if part.config else getattr(tower, "config", None)
    family = part.family or _families().get(getattr(config, "model_type", ""))
    if isinstance(family, Family) and family.tower == part.name and part.path:
        stages = family.stages_below(model, part.path, config)
        if all(_exists(model, stage.path) for stage in stages):
            return stages
    blocks = blocks_in(model, part.path, part.name == "vision")
    return [Stage(blocks.path, (), found=blocks)]


def _exists(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def check_towers(family: AnyFamily, towers: Sequence[str] | None) -> None:
    """Raise if `family` lacks one of `towers`.

    Raises:
        UsageError: it names the tower and those that there are.
    """
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


def family_of(model: nn.Module) -> AnyFamily:
    """The family of a transformers model: declared in a file, or found by discovery.

    Raises:
        UsageError: an encoder with a decoder behind it.
    """
    model_type = str(model.config.model_type)  # type: ignore[union-attr]
    return _families().get(model_type) or _found_family(model, model_type)


def _found_family(model: Any, model_type: str) -> FoundFamily:
    if getattr(type(model), "main_input_name", "") == "pixel_values" and not hasattr(model.config, "text_config"):
        return FoundFamily(model_type, (Tower("vision", "", ""),))
    language, vision = Tower("language", language_tower(model), ""), vision_tower(model)
    return FoundFamily(model_type, (language,) if vision is None else (Tower("vision", vision, ""), language))
