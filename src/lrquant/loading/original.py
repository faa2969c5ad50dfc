"""The full-precision model of a run, and everything about it that does not depend on samples."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lrquant.architectures import AnyFamily, Stage, family_of
from lrquant.architectures.targets import expose_linears
from lrquant.errors import UsageError
from lrquant.formats.layout import checkpoint_dtype
from lrquant.loading.auto_class import Modality, modality_of
from lrquant.loading.block_source import BlockSource
from lrquant.loading.offload import open_offloaded
from lrquant.loading.pretrained import fetched_folder, load_config, load_model, load_processor, stored_dtype
from lrquant.loading.quantized_source import dequantizing, quantization_of, source_note
from lrquant.loading.source_tensors import SourceTensors, source_tensors
from lrquant.loading.validation import weight_files
from lrquant.recipe import Recipe


@dataclass(frozen=True)
class BlockPlace:
    """A block: its index in the order that data flows, its stage, and its index within that stage."""

    index: int
    stage: Stage
    within: int

    @property
    def path(self) -> str:
        """The block's full name in the model."""
        return f"{self.stage.path}.{self.within}"


@dataclass(frozen=True)
class Original:
    """A full-precision model, and the parts of it that a run quantizes."""

    name: str
    model: Any  # transformers' own
    family: AnyFamily
    stages: Sequence[Stage]  # those of the recipe's towers, in the order that data flows
    storage_dtype: torch.dtype  # of what a checkpoint of it holds in floating point
    block_source: BlockSource
    processor: Any = None  # its tokenizer, image processor, or both in one
    tensors: SourceTensors = field(default_factory=SourceTensors)  # what its files hold
    notes: tuple[str, ...] = ()  # what a user should know of it

    @cached_property
    def places(self) -> Sequence[BlockPlace]:
        """Every block of its stages."""
        found = [(stage, within) for stage in self.stages for within in range(len(stage.blocks(self.model)))]
        return [BlockPlace(index, stage, within) for index, (stage, within) in enumerate(found)]

    @property
    def modality(self) -> Modality:
        return modality_of(self.model)

    @property
    def is_offloaded(self) -> bool:
        """Whether its blocks stay on disk until their turn."""
        return type(self.block_source) is not BlockSource

    @classmethod
    def in_memory(cls, model: Any, recipe: Recipe, processor: Any = None) -> "Original":
        """Of a model that is loaded.

        Raises:
            UsageError: it is quantized already, or lacks one of the recipe's towers.
        """
        name = getattr(model, "name_or_path", "") or "a model in memory"
        _refuse_quantized(model, name)
        expose_linears(model)
        family = family_of(model)
        stages = family.stages(model, recipe.towers)
        dtype = _storage_dtype(recipe, model.dtype)
        return cls(name, model.eval(), family, stages, dtype, BlockSource(model), processor)


def open_original(
    name: str | Path,
    recipe: Recipe,
    dtype: torch.dtype,
    *,
    offload: bool = False,
    keeps: bool = True,
    processor: Any = None,
    trust_remote_code: bool = False,
) -> Original:
    """The model called `name`, computing in `dtype`.

    `offload` leaves its blocks on disk until they are needed, if the model allows it. `keeps`: whether the quantized
    model in memory will be used.

    Raises:
        UsageError, LrquantError: it cannot be loaded, is quantized already, or lacks one of the recipe's towers.
    """
    name = str(name)
    config = load_config(name, trust_remote_code)
    dequantizing(config, name)  # refuses what cannot be, before anything is read
    offloaded = open_offloaded(name, dtype, recipe.towers, trust_remote_code) if offload else None
    if offloaded is not None:
        model, tensors = offloaded[0], offloaded[1].files
    else:
        model = load_model(name, dtype, trust_remote_code, original=True)
        folder = fetched_folder(name) if quantization_of(config) is None else None
        tensors = source_tensors(model, weight_files(folder), name) if folder is not None else SourceTensors()
        expose_linears(model)
    said = source_note(config)
    notes = (*([said] if said else []), *tensors.notes())
    family = family_of(model)
    stages = family.stages(model, recipe.towers)
    processor = processor or load_processor(name, modality_of(model), trust_remote_code)
    storage_dtype = _storage_dtype(recipe, stored_dtype(name, trust_remote_code))
    block_source = offloaded[1] if offloaded is not None else BlockSource(model, keeps)
    return Original(name, model, family, stages, storage_dtype, block_source, processor, tensors, notes)


def _storage_dtype(recipe: Recipe, source: torch.dtype) -> torch.dtype:
    """The precision of what the checkpoint holds in floating point, made from a model stored in `source`."""
    halved = recipe.store == "half" and source == torch.float32
    return checkpoint_dtype(recipe.scheme, torch.bfloat16 if halved else source)


def _refuse_quantized(model: Any, name: str) -> None:
    if getattr(model.config, "quantization_config", None):
        raise UsageError(f"{name}: already quantized; use the full-precision original")
