"""The small files of an unfinished run: what it is a run of, and one entry per finished block.

Each is JSON with a checksum over its contents. They are read as strangers' files are: bounded in size, every field
checked, no field that is a path (names of files follow from block numbers), and never anything but plain values.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lrquant.errors import LrquantError
from lrquant.reconstruction.records import BlockRecord
from lrquant.runtime.files import write_durably
from lrquant.runtime.paths import read_regular, reason

MOST_BYTES = 16 << 20
_HEX = r"^[0-9a-f]{64}$"
_Entry = TypeVar("_Entry", bound=BaseModel)


class RunEntry(BaseModel):
    """`run.json`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    layout: int = Field(2, ge=2, le=2)
    identity: dict[str, str]


class BlockEntry(BaseModel):
    """`00012.json`, beside `00012.safetensors`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    path: str  # of the block in the model
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=_HEX)
    after: str = Field(
        pattern=r"^([0-9a-f]{64})?$"
    )  # SHA-256 of the block before, on whose output this one was learned
    flat_inputs: list[str]
    added_biases: list[str]
    record: BlockRecord


class BitsEntry(BaseModel):
    """`bits.json`: how many bits each linear's weights get, where they follow from measured errors."""

    model_config = ConfigDict(extra="forbid", strict=True)

    bits: dict[str, int]


class Placing(BaseModel):
    """`placing.json`: the finished checkpoint's files, written before it is put in its place."""

    model_config = ConfigDict(extra="forbid", strict=True)

    files: dict[str, str]  # name → SHA-256
    identity: dict[str, str]  # as in `RunEntry`, which is deleted first


def write_entry(path: Path, entry: BaseModel) -> None:
    """Write `entry` and its checksum to the file `path`, durably."""
    values = entry.model_dump()
    text = json.dumps({"sha256": _checksum(values), "entry": values}, indent=1)
    write_durably(path, lambda temporary: temporary.write_text(text + "\n"))


def read_entry(path: Path, kind: type[_Entry]) -> _Entry:
    """The entry in the file `path`.

    Raises:
        FileNotFoundError: there is none.
        LrquantError: it is damaged.
    """
    try:
        values = json.loads(read_regular(path, MOST_BYTES, follow=False).decode("utf-8"))
        if not isinstance(values, dict) or values.keys() != {"sha256", "entry"}:
            raise ValueError("not a valid entry")
        if values["sha256"] != _checksum(values["entry"]):
            raise ValueError("its checksum does not match")
        return kind.model_validate_json(json.dumps(values["entry"]))
    except FileNotFoundError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise LrquantError(f"{path}: damaged ({where}: {first['msg']})") from error
    except (OSError, ValueError, RecursionError) as error:
        raise LrquantError(f"{path}: damaged ({reason(error)})") from error


def _checksum(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
