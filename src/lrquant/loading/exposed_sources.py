"""Locate the linears that `expose_linears` creates in a model's files, to read one expert's matrix at a time.

Files have one tensor per expert's matrix, or fused tensors of which a slice is read. A Conv1D's weight is transposed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lrquant.architectures.experts import LinearView, are_linears, fused_layout, names_in_files, rows_of
from lrquant.errors import LrquantError
from lrquant.loading.source_tensors import Source, SourceTensors


@dataclass(frozen=True)
class Part:
    """A linear's weight (out, in) or bias (out,) inside a tensor of a file."""

    source: Source
    number: int | None = None  # of the expert whose slice it is
    transposed: bool = False
    rows: slice = field(default_factory=lambda: slice(None))

    def read(self) -> Tensor:
        """A copy of its own."""
        file, key = self.source
        try:
            with safe_open(file, framework="pt") as content:
                stored = content.get_slice(key)
                tensor: Tensor = stored[:] if self.number is None else stored[self.number]
        except (OSError, SafetensorError) as error:
            raise LrquantError(f"{file}: this weight file is damaged ({error}); fetch it again") from error
        if self.transposed and self.rows == slice(None):
            return tensor.T  # strided as in the model's own memory: products round by it
        return (tensor.T if self.transposed and tensor.ndim == 2 else tensor)[self.rows].contiguous()


def exposed_sources(model: Any, stored: SourceTensors) -> dict[str, Source | Part] | None:
    """Where each tensor of `model`, whose linears are exposed, is; `stored` says where its fused tensors were.

    None: transformers merges or splits tensors besides those of experts.
    """
    found: dict[str, Source | Part] = dict(stored.found)
    pieces = dict(stored.pieces)
    names = names_in_files(model) if pieces else {}
    for path, module in model.named_modules():
        if are_linears(module):
            found |= _experts(path, module, found, pieces=pieces, names=names)
        elif isinstance(module, LinearView) and f"{path}.weight" in stored.found:
            found[f"{path}.weight"] = Part(stored.found[f"{path}.weight"], transposed=True)
        elif f"{path}.gate_up_proj" in stored.found:  # Llama 4's (experts.sorted_experts)
            found |= _sorted(path, module, stored.found)
    return None if pieces else found


def _sorted(path: str, module: Any, found: Mapping[str, Source]) -> dict[str, Part]:
    own = {}
    for number, expert in enumerate(module.children()):
        for place, name in enumerate(("gate_proj", "up_proj")):
            rows = rows_of(2 * expert.get_submodule(name).out_features, place, 2, concatenated=True)
            own[f"{path}.{number}.{name}.weight"] = Part(found[f"{path}.gate_up_proj"], number, True, rows)
        own[f"{path}.{number}.down_proj.weight"] = Part(found[f"{path}.down_proj"], number, True)
    return own


def _experts(
    path: str,
    module: Any,
    found: Mapping[str, Source | Part],
    *,
    pieces: dict[str, Source],
    names: Mapping[str, str],
) -> dict[str, Source | Part]:
    """The sources of one module's experts; those among `pieces` are taken out there."""
    own: dict[str, Source | Part] = {}
    for fused, linears in fused_layout(module).items():
        for number in range(module.num_experts):
            for place, name in enumerate(linears):
                linear = f"{path}.{number}.{name}"
                piece = pieces.pop(f"{names.get(linear)}.weight", None)
                if piece is not None:
                    own[f"{linear}.weight"] = piece
                    continue
                out = module.get_submodule(f"{number}.{name}").out_features
                rows = rows_of(len(linears) * out, place, len(linears), concatenated=module.is_concatenated)
                for kind, stored in (("weight", f"{path}.{fused}"), ("bias", f"{path}.{fused}_bias")):
                    source = found.get(stored)
                    if source is not None and not isinstance(source, Part):
                        own[f"{linear}.{kind}"] = Part(source, number, module.is_transposed, rows)
    return own
