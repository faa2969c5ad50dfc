"""A model that is never completely in memory: a skeleton without weights, and blocks that are read one by one.

transformers' own code builds the skeleton on the meta device. Modules before the blocks (embeddings, an unquantized
vision tower) are read at once, because every sample passes through them. A block is read when it is needed and dropped
when it is finished. An output head that is not called is read when the checkpoint is written.

Tensors are found as in transformers (source_tensors.py), experts one matrix at a time (exposed_sources.py). A
checkpoint in which transformers merges or splits other tensors, a model with several stages, and one with parts in
float32 are loaded completely instead.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrquant.architectures import family_of
from lrquant.architectures.targets import expose_linears
from lrquant.errors import LrquantError
from lrquant.loading.auto_class import auto_model
from lrquant.loading.block_source import BlockSource
from lrquant.loading.exposed_sources import Part, exposed_sources
from lrquant.loading.pretrained import cannot_load, fetched_folder, load_config
from lrquant.loading.source_tensors import Source, SourceTensors, read_tensor, source_tensors
from lrquant.loading.validation import weight_files
from lrquant.runtime import compat
from lrquant.runtime.memory import keep_large_apart

LARGE = 1 << 30  # bytes of a model from which its steps need memory more than they need every last percent of speed


class OffloadedBlocks(BlockSource):
    """Blocks on disk. `sources` says where each of the model's tensors is."""

    def __init__(
        self,
        model: nn.Module,
        sources: Mapping[str, Source | Part],
        dtype: torch.dtype,
        *,
        files: SourceTensors = SourceTensors(),  # noqa: B008 - immutable
    ) -> None:
        super().__init__(model, keeps=False)
        self.files = files  # what the model's files hold
        self._sources, self._dtype = dict(sources), dtype
        self._changes: dict[str, list[Callable[[nn.Module], None]]] = {}

    def take(self, path: str) -> nn.Module:
        module = self.model.get_submodule(path)
        if self.fill([f"{path}.{name}" for name in module.state_dict()]):
            for change in self._changes.get(path, ()):
                change(module)
        return module

    def release(self, path: str) -> None:
        self.model.get_submodule(path).to("meta")

    def alter(self, path: str, change: Callable[[nn.Module], None]) -> None:
        if any(tensor.is_meta for tensor in self.model.get_submodule(path).parameters()):
            self._changes.setdefault(path, []).append(change)
        else:
            super().alter(path, change)

    def untie(self, name: str, source: str) -> None:
        module, _, own = name.rpartition(".")
        shape = nn.Parameter(self.model.get_parameter(source).detach().to("meta"), requires_grad=False)
        setattr(self.model.get_submodule(module), own, shape)
        self._sources[name] = self._sources[source]

    def fill(self, names: list[str]) -> bool:
        """Give the skeleton's tensors `names` their values, unless they have them; whether any lacked them."""
        from accelerate.utils import set_module_tensor_to_device

        present = self.model.state_dict(keep_vars=True)
        missing = [name for name in names if present[name].is_meta]
        for name in missing:
            set_module_tensor_to_device(self.model, name, "cpu", value=self._stored(name))
        return bool(missing)

    def read(self, name: str) -> Tensor:
        """The tensor `name` as a model in memory has it, a copy of its own."""
        path, _, own = name.rpartition(".")
        if path not in self._changes:
            return self._stored(name)
        tensor = self.take(path).get_parameter(own).detach()
        self.release(path)
        return tensor

    def _stored(self, name: str) -> Tensor:
        """The tensor `name` as transformers would load it, a copy of its own."""
        source = self._sources[name]
        tensor = source.read() if isinstance(source, Part) else read_tensor(source)
        return tensor.to(self._dtype, copy=True) if tensor.is_floating_point() else tensor.clone()


def open_offloaded(
    name: str, dtype: torch.dtype, towers: tuple[str, ...] | None, trust_remote_code: bool
) -> tuple[Any, OffloadedBlocks] | None:
    """The model `name` with its blocks on disk; None: it has to be loaded completely.

    Raises:
        LrquantError: a weight is missing from the files, or has another shape.
    """
    config = load_config(name, trust_remote_code)
    folder = fetched_folder(name)
    if getattr(config, "quantization_config", None) or folder is None:
        return None
    if sum(file.stat().st_size for file in weight_files(folder)) > LARGE:
        keep_large_apart()
    try:
        model = _skeleton(config, folder, dtype, trust_remote_code)
    except LrquantError:
        raise
    except Exception as error:  # a stranger's configuration reaches everything underneath
        raise cannot_load(name, error) from error
    source = source_tensors(model, weight_files(folder), name)
    compat.remember_conversions(model, list(source.conversions))  # by which saving renames them back
    expose_linears(model)
    stages = family_of(model).stages(model, towers)
    sources = exposed_sources(model, source)
    if len(stages) > 1 or sources is None or compat.keeps_parts_in_float32(model, dtype):
        return None
    block_source = OffloadedBlocks(model, sources, dtype, files=source)
    head = _untied_head(model)
    block_source.fill(
        [key for key in sources if not key.startswith(f"{stages[0].path}.") and key.rpartition(".")[0] != head]
    )
    model.tie_weights(recompute_mapping=False)
    return model, block_source


def _skeleton(config: Any, folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    from accelerate import init_empty_weights
    from transformers import GenerationConfig

    with init_empty_weights(include_buffers=False):
        model = auto_model(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _untied_head(model: Any) -> str | None:
    """The name of the output head where it has weights of its own."""
    head = model.get_output_embeddings()
    if head is None or f"{_name_of(model, head)}.weight" in (getattr(model, "all_tied_weights_keys", None) or {}):
        return None
    return _name_of(model, head)


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)
