"""Compare the speed and size of checkpoints in every installed program."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lrquant.entrypoints.speed import DRIVERS, Speed, Work, installed
from lrquant.errors import UsageError
from lrquant.loading.pretrained import resolve_model


@dataclass(frozen=True)
class Measured:
    """One checkpoint in one program; either `speed`, or why not."""

    path: str
    program: str
    speed: Speed | None
    failed: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench(
    paths: Sequence[str],
    programs: Sequence[str] | None = None,
    *,
    prompt: int = 128,
    new: int = 64,
    threads: int | None = None,
    callback: Callable[[str], None] = lambda line: None,
) -> list[Measured]:
    """Load each of `paths` in each of `programs`, process a prompt and generate, each time in a separate process.

    Args:
        paths: folders of checkpoints, quantized or not, or `zoo:NAME`.
        programs: `transformers`, `llama.cpp` (which gets a GGUF), `vllm`; None: those that are installed.
        prompt, new: the number of tokens in the prompt, and of generated ones.
        threads: of the CPU; None: all.
        callback: receives a line that says what is measured next.

    Raises:
        UsageError: no such program, or it is not installed; a path is no checkpoint.
    """
    here = installed()
    for program in programs or ():
        if program not in DRIVERS:
            raise UsageError(f"no program {program!r}: there are {', '.join(DRIVERS)}")
        if program not in here:
            raise UsageError(f"{program} is not installed here: pip install {DRIVERS[program][0]}")
    found = []
    threads = threads or os.cpu_count() or 1
    for path, folder in zip(paths, [_folder(path) for path in paths], strict=True):
        for program in programs or here:
            callback(f"{path} in {program}")
            found.append(_measured(path, program, Work(folder, prompt, new, threads)))
    return found


def _folder(path: str) -> str:
    folder = resolve_model(path)
    if not Path(folder).is_dir():
        raise UsageError(f"{path}: not a folder; give a local checkpoint")
    return folder


def _measured(path: str, program: str, work: Work) -> Measured:
    environment = os.environ | {"OMP_NUM_THREADS": str(work.threads)}
    command = [sys.executable, "-m", "lrquant.entrypoints.speed", program, json.dumps(asdict(work))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return Measured(path, program, None, f"ended with code {done.returncode} ({_last(done.stderr)})")
    answer = json.loads(lines[-1])
    if "failed" in answer:
        return Measured(path, program, None, answer["failed"])
    return Measured(path, program, Speed(**answer))


def _last(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")
