"""The data behind a report: `report/run.json` (numbers, words) and `report/measurements.safetensors`.

They have a separate folder because servers load every `*.safetensors` file beside a model's `config.json`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lrquant.errors import UsageError
from lrquant.runtime.paths import permit

if TYPE_CHECKING:
    from torch import Tensor

FOLDER, RUN_FILE, MEASUREMENTS_FILE, PAGE = "report", "run.json", "measurements.safetensors", "report.html"


class _Kept(BaseModel):
    model_config = ConfigDict(extra="ignore", ser_json_inf_nan="constants")


class Error(_Kept):
    """Errors of outputs relative to the original's; means over tokens."""

    relative: float  # |ŷ − y| / |y|
    cosine: float


class Errors(_Kept):
    """A block's output error with f(x; W) as the truth. All but `own` start from the quantized stream x̂."""

    inherited: Error | None = None  # f(x̂; W): the original block, so only what the blocks before it did
    plain: Error | None = None  # every number rounded to its nearest, no smoothing, no clipping
    smoothing_start: Error | None = None  # smoothing alone, where it starts
    smoothing_learned: Error | None = None  # smoothing alone, as learned
    start: Error | None = None  # everything, before learning
    end: Error | None = None  # as the block was left
    own: Error | None = None  # f(x; quantized): the block on the original's own input

    @property
    def smoothed(self) -> Error | None:
        """Smoothing alone, as the run left it."""
        return self.smoothing_learned or self.smoothing_start


class Sensitivity(_Kept):
    """The block's relative output error when one linear alone, and its input, are quantized."""

    layer: str
    plain: float  # rounded to nearest
    final: float | None  # with the run's smoothing, clipping and rounding


class LinearInput(_Kept):
    """The input of a linear: its largest channel over its median channel."""

    layers: list[str]  # those that read this one input
    outlier_ratio: float
    smoothed_outlier_ratio: float | None = None


class Block(_Kept):
    """What a report shows of one block."""

    index: int
    path: str
    outcome: str  # as in reconstruction.records; "not relearned" where adaptation left the block alone
    initial_loss: float | None = None
    final_loss: float | None = None
    epoch_losses: list[float] = Field(default_factory=list)
    recoveries: int = 0
    restored: bool = False  # finished by an interrupted run
    seconds: float = 0.0
    errors: Errors | None = None
    sensitivity: list[Sensitivity] = Field(default_factory=list)
    inputs: list[LinearInput] = Field(default_factory=list)


class Metric(_Kept):
    """One number of the model before and after."""

    name: str
    before: float | None
    after: float
    better: Literal["lower", "higher"] = "lower"
    detail: str = ""
    windows_before: list[float] = Field(default_factory=list)  # mean negative log-likelihood of each window
    windows_after: list[float] = Field(default_factory=list)


class Compared(_Kept):
    """One line of a comparison of methods on the same model and format."""

    method: str
    values: dict[str, float]
    bits_per_weight: float
    megabytes: float
    seconds: float


class Run(_Kept):
    """Everything that a report shows of a run."""

    kind: Literal["quantize", "adapt", "demo"]
    model: str  # what was quantized; for adapt the quantized checkpoint
    reference: str | None = None  # adapt: the full-precision original
    method: str
    format: str
    command: str
    recipe: dict[str, Any]
    created: str  # ISO 8601
    seconds: float
    peak_memory_bytes: int | None = None
    profile: dict[str, float] = Field(default_factory=dict)  # seconds by part
    device: str
    checkpoint_bytes: int | None = None
    original_bytes: int | None = None  # in the original's own precision
    bits_per_weight: float | None = None
    samples_looked_at: str = ""  # on what the per-block errors were measured
    metrics: list[Metric] = Field(default_factory=list)
    compared: list[Compared] = Field(default_factory=list)
    blocks: list[Block] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)


def save_run(directory: Path, run: Run, measurements: Mapping[str, "Tensor"]) -> None:
    """Write both files; each appears whole or not at all."""
    from safetensors.torch import save_file

    folder = directory / FOLDER
    folder.mkdir(exist_ok=True)
    part = folder / f".{MEASUREMENTS_FILE}.part"
    save_file({name: tensor.contiguous() for name, tensor in measurements.items()}, part)
    permit(part)
    part.replace(folder / MEASUREMENTS_FILE)
    write_whole(folder / RUN_FILE, run.model_dump_json(indent=1) + "\n")


def read_run(directory: Path) -> Run:
    """The numbers that `save_run` wrote; imports nothing heavy.

    Raises:
        UsageError: nothing of that kind lies there, or it is damaged.
    """
    path = directory / FOLDER / RUN_FILE
    if not path.is_file():
        raise UsageError(f"{directory}: no report data here ({FOLDER}/{RUN_FILE}); quantize, adapt and demo write it")
    try:
        return Run.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UsageError(f"{path}: not the data of a run ({where}: {first['msg']}); run it again") from None


def load_run(directory: Path) -> tuple[Run, dict[str, "Tensor"]]:
    """Everything that `save_run` wrote.

    Raises:
        UsageError: nothing of that kind lies there, or it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    run, path = read_run(directory), directory / FOLDER / MEASUREMENTS_FILE
    try:
        return run, load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); run it again") from None


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path`, which appears whole or not at all.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
