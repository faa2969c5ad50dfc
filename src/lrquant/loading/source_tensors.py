"""Locate a model's tensors in its files, with the renamings that transformers applies when loading.

No tensor is ignored silently. Every tensor of the files is one of these:

    found      a tensor of the model, or a piece of one
    carried    the class passes over it on purpose, though other loaders use it: a head that predicts several tokens
    unread     the class has no place for it; its name is said
    the rest   buffers of older releases, which models compute today (rotary frequencies, position ids)

and blocks beyond those that the configuration names are an error.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lrquant.errors import LrquantError
from lrquant.runtime.compat import passed_over_patterns

Source = tuple[Path, str]  # a file, and a tensor's name in it
_FLOATING = ("F", "BF")  # how safetensors' names of floating-point types begin


@dataclass(frozen=True)
class SourceTensors:
    """Where each of a model's tensors is, and what its files hold besides."""

    found: Mapping[str, Source] = field(default_factory=dict)  # without those that are made of `pieces`
    pieces: Mapping[str, Source] = field(default_factory=dict)  # by their own names: what transformers merges or splits
    carried: Mapping[str, Source] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    conversions: Sequence[Any] = ()  # transformers' own, that these files needed

    def notes(self) -> list[str]:
        """One line for each thing that a user should know."""
        lines = []
        if self.carried:
            lines.append(f"Copied without quantization, for loaders that use it: {_patterns(self.carried)}.")
        if self.unread:
            lines.append(f"The model's class does not use these tensors, and the result does not have them: "
                         f"{_patterns(self.unread)}.")  # fmt: skip
        return lines

    def read_carried(self) -> Iterator[dict[str, Tensor]]:
        """The carried tensors as they are stored, one at a time."""
        for name, source in self.carried.items():
            yield {name: read_tensor(source)}


@dataclass(frozen=True)
class _Stored:
    """A tensor as a file's header describes it."""

    source: Source
    shape: tuple[int, ...]
    dtype: str  # safetensors' name of the type

    @property
    def floating(self) -> bool:
        return self.dtype.startswith(_FLOATING)


def source_tensors(model: Any, files: Sequence[Path], name: str) -> SourceTensors:
    """Where each tensor of the skeleton `model` is in `files`. Ties that the files contradict are undone in `model`.

    Raises:
        LrquantError: a weight is missing, has another shape or is no floating-point number; or the files hold more
            blocks than the configuration.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    wanted = model.state_dict()
    found: dict[str, Source] = {}
    pieces: dict[str, Source] = {}
    whole: set[str] = set()  # tensors of the model that are made of them
    others: dict[str, tuple[str, _Stored]] = {}  # by their own names: transformers' name, what they are
    for key, stored in headers(files):
        target, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, wanted)
        if target not in wanted and key in wanted:
            target = key
        if target not in wanted:
            others[key] = target, stored
            continue
        if wanted[target].is_floating_point() and not stored.floating:
            raise LrquantError(f"{name}: {key} is stored as {stored.dtype}, which is not a floating-point type")
        if converted is not None:
            pieces[key] = stored.source
            whole.add(target)
            continue
        if stored.shape != tuple(wanted[target].shape):
            raise LrquantError(
                f"{name}: cannot be loaded ({key} is {stored.shape}, the configuration expects "
                f"{tuple(wanted[target].shape)})"
            )
        found[target] = stored.source
    _settle_ties(model, found)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    missing = sorted(wanted.keys() - found.keys() - whole - set(tied))
    if missing:
        raise LrquantError(f"{name}: the checkpoint lacks {len(missing)} weights, among them {missing[0]}")
    carried, unread = _sorted_out(model, others, name)
    used = [entry for entry in mapping if entry.was_used()]
    return SourceTensors(found, pieces, carried, unread, used)


def headers(files: Sequence[Path]) -> Iterator[tuple[str, _Stored]]:
    """Every tensor of `files` by name."""
    for file in files:
        try:
            with safe_open(file, framework="pt") as content:
                for key in content.keys():  # noqa: SIM118
                    part = content.get_slice(key)
                    yield key, _Stored((file, key), tuple(part.get_shape()), part.get_dtype())
        except (OSError, SafetensorError) as error:
            raise LrquantError(f"{file}: this weight file is damaged ({error}); fetch it again") from error


def read_tensor(source: Source) -> Tensor:
    """A tensor as it is stored."""
    file, key = source
    try:
        with safe_open(file, framework="pt") as content:
            tensor: Tensor = content.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise LrquantError(f"{file}: this weight file is damaged ({error}); fetch it again") from error
    return tensor


def _settle_ties(model: Any, found: dict[str, Source]) -> None:
    """As transformers does: a tie holds unless the files have both tensors with different values."""
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    untied = []
    for target, source in tied.items():
        if target in found and source not in found:
            found[source] = found[target]
        elif target in found and not torch.equal(read_tensor(found[target]), read_tensor(found[source])):
            untied.append(target)
    for target in untied:
        path, _, own = target.rpartition(".")
        shape = model.get_parameter(target).detach().to("meta")
        setattr(model.get_submodule(path), own, nn.Parameter(shape, requires_grad=False))
    if untied:
        model.all_tied_weights_keys = {target: source for target, source in tied.items() if target not in untied}
        say_untied(model)


def say_untied(model: Any) -> None:
    """Make the configuration agree with a model whose head has weights of its own: other loaders believe it."""
    head = model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if head is None or f"{names[id(head)]}.weight" in tied:
        return
    for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def _sorted_out(
    model: Any, others: Mapping[str, tuple[str, _Stored]], name: str
) -> tuple[dict[str, Source], tuple[str, ...]]:
    """(tensors to carry over, names of those that nobody reads) out of those that the model has no place for."""
    paths = {path for path, _ in model.named_modules()}
    groups: dict[str, list[str]] = {}
    for key, (target, _) in others.items():
        groups.setdefault(_stranger(model, target, paths), []).append(key)
    passed_over = passed_over_patterns(model)
    carried: dict[str, Source] = {}
    unread: list[str] = []
    for group, keys in groups.items():
        weights = any(stored.floating and len(stored.shape) > 1 for _, stored in map(others.__getitem__, keys))
        known = all(
            any(pattern.search(key) or pattern.search(others[key][0]) for pattern in passed_over) for key in keys
        )
        if weights and (known or _predicts_tokens(model, group)):
            carried |= {key: others[key][1].source for key in keys}
        elif not known:
            _check_blocks(model, group, name)
            unread += keys
    return carried, tuple(unread)


def _stranger(model: Any, key: str, paths: set[str]) -> str:
    """The first part of `key` that is not in the model."""
    prefix = f"{model.base_model_prefix}."
    parts = key.split(".")
    for count in range(1, len(parts)):
        path = ".".join(parts[:count])
        if path not in paths and prefix + path not in paths:
            return path
    return key


def _next_block(model: Any, group: str) -> tuple[int, int] | None:
    """(the number that `group` would have in a list of the model's modules, their count), where it is one."""
    above, _, number = group.rpartition(".")
    for path in (above, f"{model.base_model_prefix}.{above}"):
        blocks = dict(model.named_modules()).get(path)
        if isinstance(blocks, nn.ModuleList) and number.isdigit():
            return int(number), len(blocks)
    return None


def _predicts_tokens(model: Any, group: str) -> bool:
    """Whether `group` is one of the blocks behind the last that predict further tokens (DeepSeek-V3 and its kin)."""
    place = _next_block(model, group)
    more = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0
    return place is not None and place[0] < place[1] + more


def _check_blocks(model: Any, group: str, name: str) -> None:
    place = _next_block(model, group)
    if place is not None:
        raise LrquantError(
            f"{name}: its files hold {group}, but its configuration has only {place[1]} blocks; "
            f"correct num_hidden_layers in config.json, or remove those weights"
        )


def _patterns(names: Sequence[str] | Mapping[str, Any], most: int = 6) -> str:
    """`names` with * for numbers, shortened."""
    found = list(dict.fromkeys(re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name) for name in names))
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")
