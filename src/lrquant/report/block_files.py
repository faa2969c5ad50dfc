"""What was measured of finished blocks, kept in an unfinished run's folder until the run resumes.

- `report/00012.safetensors`: the block's measurements (observer.py)
- `report/00012.json`: its numbers, and the checksum of that file
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lrquant.errors import LrquantError
from lrquant.report.run import Block
from lrquant.resume.manifest import read_entry, write_entry
from lrquant.runtime.files import checksum, write_tensors

FOLDER = "report"


class MeasuredBlock(BaseModel):
    """`00012.json`."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    block: Block
    looked_at: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


def keep_block(run_folder: Path, block: Block, measurements: dict[str, Tensor], *, looked_at: str) -> None:
    """Write what was measured of `block`.

    Raises:
        LrquantError: the disk is full.
    """
    folder = run_folder / FOLDER
    folder.mkdir(exist_ok=True)
    file = folder / f"{block.index:05}.safetensors"
    write_tensors(file, measurements)
    entry = MeasuredBlock(block=block, looked_at=looked_at, sha256=checksum(file))
    write_entry(file.with_suffix(".json"), entry)


def kept_block(run_folder: Path, index: int) -> tuple[MeasuredBlock, dict[str, Tensor]] | None:
    """What `keep_block` wrote of a block; None where there is nothing, or it is damaged."""
    file = run_folder / FOLDER / f"{index:05}.safetensors"
    try:
        entry = read_entry(file.with_suffix(".json"), MeasuredBlock)
        if entry.block.index != index or entry.sha256 != checksum(file):
            return None
        return entry, load_file(file)
    except (OSError, LrquantError, SafetensorError):
        return None
