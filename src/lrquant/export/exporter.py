"""The Exporter class: exports finished checkpoints (registry.py has exporters by name)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Exported:
    """What an exporter wrote."""

    path: Path
    bytes: int
    facts: dict[str, str] = field(default_factory=dict)  # what to show of it, in words
    notes: tuple[str, ...] = ()  # what a user should know besides


@dataclass(frozen=True)
class Exporter:
    """One format of finished checkpoints.

    `write(folder, target, dtype)` reads the checkpoint in `folder`. `target` does not exist, its parent does. `dtype`
    is one of `dtypes`, for what is not quantized. It raises UsageError for what the format cannot hold.
    """

    name: str
    summary: str
    write: Callable[[Path, Path, str], Exported]
    dtypes: tuple[str, ...]  # the first is the default
