"""Exporters of finished checkpoints, by name: what `lrquant export DIR --to NAME` can write.

An exporter reads the checkpoint in a folder and writes one file or one folder, completely or not at all. A new one is a
file with such a function, and a row here (docs/adding-an-exporter.md).
"""

from pathlib import Path

from lrquant.errors import UsageError
from lrquant.export.dense import DTYPES, export_dense
from lrquant.export.exporter import Exported, Exporter
from lrquant.export.gguf.writer import export_gguf

EXPORTERS: dict[str, Exporter] = {}


def register(exporter: Exporter) -> None:
    """Make `exporter` known under its name."""
    EXPORTERS[exporter.name] = exporter


def export(folder: str | Path, target: str | Path, to: str = "gguf", *, dtype: str | None = None) -> Exported:
    """Write the checkpoint in `folder` as `target`, in the format called `to`.

    Args:
        folder: a checkpoint that lrquant wrote, or one that is not quantized.
        target: the file, or the folder, that is made; it must not exist.
        to: `gguf` (a file for llama.cpp) or `dense` (a checkpoint in floating point), or what was registered.
        dtype: what embeddings, head and whatever else is not quantized become; None: the format's default.

    Raises:
        UsageError: no such format, `target` is taken, or the format cannot hold this checkpoint.
        LrquantError: a file is damaged, or `target` cannot be written. Nothing is left behind.
    """
    folder, target = Path(folder), Path(target)
    exporter = EXPORTERS.get(to)
    if exporter is None:
        raise UsageError(f"unknown exporter {to!r}: there are {', '.join(EXPORTERS)}")
    dtype = dtype or exporter.dtypes[0]
    if dtype not in exporter.dtypes:
        raise UsageError(f"dtype {dtype}: {to} has {', '.join(exporter.dtypes)}")
    if target.exists():
        raise UsageError(f"{target}: already exists; choose another name")
    if not target.absolute().parent.is_dir():
        raise UsageError(f"{target}: the folder {target.parent} does not exist")
    return exporter.write(folder, target, dtype)


register(Exporter("gguf", "llama.cpp's model file", export_gguf, ("f16", "bf16", "f32", "q8_0")))
register(Exporter("dense", "a floating-point checkpoint of the rounded weights", export_dense, tuple(DTYPES)))
