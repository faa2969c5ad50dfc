"""`lrquant export`: convert a finished checkpoint to another program's format."""

from pathlib import Path
from typing import Annotated

import typer

from lrquant.cli import console
from lrquant.cli.quantize import JsonFile


def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The checkpoint to export, quantized or not.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write (for dense: the folder).")],
    to: Annotated[
        str, typer.Option(metavar="FORMAT", help="gguf: for llama.cpp; dense: a floating-point checkpoint.")
    ] = "gguf",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Data type of tensors that are not quantized: f16, bf16, f32 or, in GGUF, q8_0.",
            show_default="gguf: f16; dense: bf16",
        ),
    ] = None,
    json: JsonFile = None,
) -> None:
    """Convert the checkpoint DIR to OUT: for llama.cpp, or with dense weights."""
    console.check_output(json)
    from lrquant.export.registry import export

    written = export(directory, target, to, dtype=dtype)
    rows = [["saved to", str(written.path)], ["size", console.megabytes(written.bytes)]]
    rows += [[name, text] for name, text in written.facts.items()]
    console.table(f"{directory} as {to}", ["", ""], rows, words=(0, 1))
    for note in written.notes:
        console.note(note)
    figures = {"path": str(written.path), "bytes": written.bytes, "notes": list(written.notes)}
    console.write_json(json, figures | written.facts)
