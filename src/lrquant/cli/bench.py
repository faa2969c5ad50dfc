"""`lrquant bench`: tokens per second of checkpoints, in the programs that are installed."""

from pathlib import Path
from typing import Annotated

import typer

from lrquant.cli import console
from lrquant.cli.quantize import JsonFile


def bench(
    checkpoints: Annotated[list[str], typer.Argument(metavar="DIR…", help="Checkpoints to compare, quantized or not.")],
    programs: Annotated[
        str | None,
        typer.Option("--in", metavar="A,B,…", help="transformers, llama.cpp, vllm.", show_default="what is installed"),
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Prompt length in tokens.")] = 128,
    new: Annotated[int, typer.Option(min=1, help="Number of tokens to generate.")] = 64,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="all")] = None,
    json: JsonFile = None,
) -> None:
    """Measure how fast the checkpoints DIR… run: load time, tokens per second, peak memory, size."""
    console.check_output(json)
    from lrquant.entrypoints.bench import bench

    chosen = programs.split(",") if programs else None
    found = bench(checkpoints, chosen, prompt=prompt, new=new, threads=threads, callback=console.note)
    rows = []
    for each in found:
        name, speed = Path(each.path).name, each.speed
        if speed is None:
            rows.append([name, each.program, f"not run: {each.failed}", "", "", "", "", ""])
            continue
        rows.append(
            [
                name,
                each.program,
                console.megabytes(speed.file_bytes),
                f"{speed.load_seconds:.1f} s",
                f"{speed.prefill:.0f} ({speed.prefill_cpu:.0f})",
                f"{speed.decode:.1f} ({speed.decode_cpu:.1f})",
                console.megabytes(speed.peak_bytes),
            ]
        )
    columns = [
        "checkpoint",
        "in",
        "size",
        "load",
        "prompt tokens/s (per CPU s)",
        "new tokens/s (per CPU s)",
        "peak memory",
    ]
    console.table(f"{prompt} prompt tokens, {new} generated", columns, [row[:7] for row in rows], words=(0, 1, 2))
    console.write_json(json, {"prompt": prompt, "new": new, "measured": [each.as_dict() for each in found]})
