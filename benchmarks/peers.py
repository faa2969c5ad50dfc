"""lrquant beside llm-compressor and AutoRound: the same model, samples, bits and evaluation text, in one go.

    python benchmarks/peers.py --json peers.jsonl
    python benchmarks/peers.py --json peers.jsonl --rows "W2A16 g64,W4A4" --methods "lrquant-max auto-round/best"
    python benchmarks/peers.py --json peers.jsonl --table

The others run from their own packages in an environment of their own, made on first use. Every job is a process of its
own (`benchmarks/peers/`). A result is a line of the file as soon as it is there; the same command goes on where it
stopped, and tries again what failed.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import lrquant
from lrquant.calibration.text import calibration_samples, evaluation_ids
from lrquant.errors import LrquantError
from lrquant.evaluation import perplexity
from lrquant.loading.pretrained import load_model, load_tokenizer
from lrquant.method_presets import PRESETS
from methods import recipe_of
from peers_table import FULL, MORE_ROWS, OURS, PEERS, ROWS, append_line, fitted, impossible, overview, read_lines, table

SCRIPTS = Path(__file__).parent / "peers"
SOURCE = Path(lrquant.__file__).parent.parent


@dataclass(frozen=True)
class Settings:
    """What must be equal for two results to stand in one table."""

    model: str
    calib: str
    texts: list[str]
    nsamples: int
    seqlen: int
    windows: int
    epochs: int
    batch_size: int
    threads: int
    iterations: int | None


def environment(folder: Path) -> Path:
    """The Python of an environment with the peers' packages, made in `folder` unless it is there already."""
    python, wanted = folder / "bin" / "python", (SCRIPTS / "requirements.txt").read_text()
    made = folder / "peers-requirements.txt"  # written last: a half-made environment lacks it
    if made.is_file() and made.read_text() == wanted:
        return python
    if not python.is_file():
        venv.create(folder, with_pip=True)
    command = [str(python), "-m", "pip", "install", "-q", "-r", str(SCRIPTS / "requirements.txt")]
    done = subprocess.run(command, capture_output=True, text=True)  # torch among them: minutes
    if done.returncode:
        raise LrquantError(f"{folder}: the peers' packages cannot be installed ({last_line(done.stderr)})")
    made.write_text(wanted)
    return python


def last_line(text: str) -> str:
    """The last line that says something, shortened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no word of why"


def widths(folder: Path) -> set[int]:
    """Inputs of the linears that are quantized: all but the head's."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    head = model.get_output_embeddings()
    return {part.in_features for part in model.modules() if isinstance(part, torch.nn.Linear) and part is not head}


def prepare(settings: Settings, seeds: Iterable[int], work: Path) -> dict[str, float]:
    """The model in float32 and each seed's tokens as plain files; perplexity of the original on every text."""
    tokenizer, model = load_tokenizer(settings.model), load_model(settings.model, torch.float32)
    model.save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    tokens = {text: evaluation_ids(tokenizer, text) for text in settings.texts}
    for seed in seeds:
        samples = calibration_samples(tokenizer, settings.calib, settings.nsamples, settings.seqlen, seed)
        save_file({"calibration": torch.cat(samples), **tokens}, work / f"{seed}.safetensors")
    return {text: perplexity(model, ids, settings.seqlen, settings.windows).value for text, ids in tokens.items()}


def do(method: str, numbers: dict[str, Any], seed: int, settings: Settings, work: Path, env: Path, limit: int) -> Any:
    """One job in a process of its own: its answer, or `missing` and why there is none."""
    shared = {"nsamples": settings.nsamples, "seqlen": settings.seqlen, "calibration": settings.calib, "seed": seed}
    if reason := impossible(method, numbers):
        return {"missing": reason}
    try:
        has_own = "epochs" in PRESETS.get(method.partition(":")[0], {})
        learning = {} if has_own else {"epochs": settings.epochs, "batch_size": settings.batch_size}
        recipe = None if method in PEERS else recipe_of(method, numbers | shared, learning).model_dump(mode="json")
        script, called = PEERS.get(method, ("ours.py", method))
        python = environment(env) if method in PEERS else Path(sys.executable)
    except LrquantError as error:
        return {"missing": str(error)}
    surroundings = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    surroundings |= {"OMP_NUM_THREADS": str(settings.threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    if method not in PEERS:
        surroundings["PYTHONPATH"] = str(SOURCE)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        job = {
            "method": called,
            "numbers": numbers,
            "recipe": recipe,
            "seed": seed,
            "threads": settings.threads,
            "iterations": settings.iterations,
            "model": str(work / "model"),
            "tensors": str(work / f"{seed}.safetensors"),
            "texts": settings.texts,
            "seqlen": settings.seqlen,
            "windows": settings.windows,
            "source": str(SOURCE),
            "folder": folder,
        }
        path = Path(folder, "job.json")
        path.write_text(json.dumps(job))
        command = [str(python), str(SCRIPTS / script), str(path)]
        try:
            done = subprocess.run(
                command, cwd=folder, env=surroundings, capture_output=True, text=True, timeout=limit, errors="replace"
            )
        except subprocess.TimeoutExpired:
            return {"missing": f"not done after {limit} s"}
        answer = Path(folder, "answer.json")
        if done.returncode or not answer.is_file():
            return {"missing": last_line(done.stderr)}
        return json.loads(answer.read_text())


def chosen(names: str, separator: str | None, known: Iterable[str]) -> list[str]:
    """The names in an option; a method may carry changes to its recipe after a colon."""
    found = [name.strip() for name in names.split(separator) if name.strip()]
    if unknown := [name for name in found if name.partition(":")[0] not in known]:
        raise typer.BadParameter(f"unknown {', '.join(unknown)}: there are {', '.join(known)}")
    return found


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Results, one a line; what is there is not redone.")],
    model: Annotated[str, typer.Option(help="A bundled model, a folder or a hub name.")] = "zoo:llama",
    rows: Annotated[str, typer.Option(help="Number formats, separated by commas.")] = ",".join(
        row for row in ROWS if row not in MORE_ROWS
    ),
    methods: Annotated[str, typer.Option(help="Methods, separated by spaces.")] = " ".join([*OURS, *PEERS]),
    seeds: int = 3,
    samples: int = 128,
    seqlen: int = 256,
    windows: int = 64,
    calib: str = "zoo:pydoc",
    texts: str = "zoo:pydoc zoo:pycode",
    epochs: Annotated[int, typer.Option(help="lrquant's, where the preset has no number of its own.")] = 5,
    batch_size: Annotated[int, typer.Option(help="lrquant's samples per step, likewise.")] = 4,
    threads: int = 1,
    iterations: Annotated[int | None, typer.Option(help="AutoRound's steps, fewer than its own to try things.")] = None,
    limit: Annotated[int, typer.Option(help="Seconds after which a job is given up.")] = 7200,
    env: Annotated[Path, typer.Option(help="Where the peers' environment is or will be.")] = Path(
        "~/.cache/lrquant/peers"
    ),
    show: Annotated[
        bool, typer.Option("--table", help="Print the tables of what is in the file, and do nothing.")
    ] = False,
) -> None:
    """Run what is missing, then print a markdown table of all rows, and one of every row."""
    err = Console(stderr=True)
    wanted_rows, wanted = chosen(rows, ",", ROWS), chosen(methods, None, [*OURS, *PEERS])
    settings = Settings(model, calib, texts.split(), samples, seqlen, windows, epochs, batch_size, threads, iterations)
    kept = read_lines(json_file)
    if show:
        settings = Settings(**kept[0]["settings"]) if kept else settings
    if other := next((line["settings"] for line in kept if line["settings"] != vars(settings)), None):
        raise typer.BadParameter(f"{json_file} holds results of other settings, {other}")
    finished = {(line["row"], line["method"], line["seed"]) for line in kept if "perplexity" in line}
    jobs = [(seed, row, method) for seed in range(seeds) for row in wanted_rows for method in wanted]
    jobs = [] if show else [job for job in jobs if (job[1], job[2], job[0]) not in finished]
    if jobs:
        with tempfile.TemporaryDirectory() as folder:
            work, began = Path(folder), time.perf_counter()
            original = prepare(settings, sorted({seed for seed, _, _ in jobs}), work)
            if ("", FULL, 0) not in finished:
                append_line(
                    json_file,
                    {"settings": vars(settings), "row": "", "method": FULL, "seed": 0, "perplexity": original},
                )
            fits = {row: fitted(ROWS[row], widths(work / "model")) for row in wanted_rows}
            for done, (seed, row, method) in enumerate(jobs, 1):
                answer = do(method, fits[row], seed, settings, work, env.expanduser().absolute(), limit)
                line = {"settings": vars(settings), "row": row, "numbers": fits[row], "method": method, "seed": seed}
                if line | answer not in kept:
                    append_line(json_file, line | answer)
                left = (time.perf_counter() - began) * (len(jobs) / done - 1)
                found = answer.get("missing") or " ".join(f"{value:.3f}" for value in answer["perplexity"].values())
                err.print(
                    f"{done}/{len(jobs)} seed {seed} {row}, {method}: {found}, {left / 60:.0f} min left", soft_wrap=True
                )
    lines = read_lines(json_file)
    for text in settings.texts:
        print("\n" + overview(lines, wanted_rows, wanted, text))
    for row in wanted_rows:
        print("\n" + table(lines, row, wanted, settings.texts))


if __name__ == "__main__":
    typer.run(main)
