"""How fast one program runs one checkpoint, measured in this process: `python -m lrquant.entrypoints.speed`.

The work is a prompt of the offline text, read at once, and tokens after it, the likeliest each time. CPU seconds are
those of all threads. `DRIVERS` has a function for each program; bench.py starts a process for each measurement, so that
peaks of memory are its own.
"""

import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lrquant.calibration.text import evaluation_ids
from lrquant.errors import UsageError
from lrquant.export.registry import export
from lrquant.export.shards import tensor_bytes
from lrquant.loading.checkpoint import load
from lrquant.loading.pretrained import load_tokenizer
from lrquant.runtime.memory import PeakMemory

TEXT = "zoo:pydoc"


@dataclass(frozen=True)
class Work:
    """What is measured."""

    path: str
    prompt: int  # tokens that are read at once
    new: int  # tokens that are generated
    threads: int


@dataclass
class Speed:
    """Tokens per second by the clock and per second of CPU time."""

    load_seconds: float
    prefill: float
    prefill_cpu: float
    decode: float
    decode_cpu: float
    peak_bytes: int = 0
    file_bytes: int = 0


class _Clock:
    """Seconds by the clock and of CPU time since the last lap."""

    def __init__(self) -> None:
        self._before = self._now()

    def lap(self) -> tuple[float, float]:
        before, self._before = self._before, self._now()
        return self._before[0] - before[0], self._before[1] - before[1]

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


def _speed(work: Work, loaded: float, *, prefill: tuple[float, float], decode: tuple[float, float]) -> Speed:
    read = [work.prompt / max(took, 1e-9) for took in prefill]
    written = [work.new / max(took, 1e-9) for took in decode]
    return Speed(loaded, prefill=read[0], prefill_cpu=read[1], decode=written[0], decode_cpu=written[1])


def _prompt(path: str, count: int) -> list[int]:
    """The first `count` tokens of the offline text."""
    found: list[int] = evaluation_ids(load_tokenizer(path), TEXT)[:count].tolist()
    return found


@torch.inference_mode()
def _transformers(work: Work) -> Speed:
    ids = torch.tensor([_prompt(work.path, work.prompt)])
    clock = _Clock()
    model = load(work.path, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    model(ids[:, :1])  # what is unpacked at the first call
    loaded = clock.lap()[0]
    answer = model(ids, use_cache=True)
    prefill = clock.lap()
    for _ in range(work.new):
        last = answer.logits[:, -1:].argmax(-1)
        answer = model(last, past_key_values=answer.past_key_values, use_cache=True)
    return _speed(work, loaded, prefill=prefill, decode=clock.lap())


def _llama_cpp(work: Work) -> Speed:
    import xllamacpp

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        size = export(work.path, file).bytes
        ids = _prompt(work.path, work.prompt)
        settings = xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel = str(file), len(ids) + work.new + 8, 1
        settings.warmup, settings.verbosity, settings.n_gpu_layers = False, -1, -1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = work.threads
        clock = _Clock()
        server = xllamacpp.Server(settings)

        def complete(count: int) -> None:
            asked = {"prompt": ids, "n_predict": count, "temperature": 0.0, "cache_prompt": True, "ignore_eos": True}
            answer = server.handle_completions(asked)
            if "choices" not in answer:
                raise UsageError(f"{work.path}: llama.cpp failed ({answer})")

        loaded = clock.lap()[0]
        complete(1)
        prefill = clock.lap()
        complete(work.new + 1)  # the prompt is remembered, but for its last token
        speed = _speed(work, loaded, prefill=prefill, decode=clock.lap())
    speed.file_bytes = size
    return speed


def _vllm(work: Work) -> Speed:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # CPU time and memory are this process's
    import vllm

    ids = _prompt(work.path, work.prompt)
    clock = _Clock()
    engine = vllm.LLM(work.path, max_model_len=len(ids) + work.new + 8, max_num_seqs=1, enable_prefix_caching=False)
    loaded = clock.lap()[0]

    def generate(count: int) -> tuple[float, float]:
        parameters = vllm.SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
        clock.lap()
        engine.generate({"prompt_token_ids": ids}, parameters, use_tqdm=False)
        return clock.lap()

    generate(2)  # what is compiled at the first call
    prefill = generate(1)
    both = generate(work.new + 1)
    return _speed(work, loaded, prefill=prefill, decode=(both[0] - prefill[0], both[1] - prefill[1]))


DRIVERS: dict[str, tuple[str, Callable[[Work], Speed]]] = {  # program → (its package, what measures it)
    "transformers": ("transformers", _transformers),
    "llama.cpp": ("xllamacpp", _llama_cpp),
    "vllm": ("vllm", _vllm),
}


def installed() -> list[str]:
    """The programs that are here."""
    needed = {"llama.cpp": ("xllamacpp", "gguf")}
    return [
        name
        for name, (package, _) in DRIVERS.items()
        if all(importlib.util.find_spec(each) for each in needed.get(name, (package,)))
    ]


def measure(program: str, work: Work) -> Speed:
    """Run `work` in `program`."""
    torch.set_num_threads(work.threads)
    memory = PeakMemory()
    speed = DRIVERS[program][1](work)
    speed.peak_bytes = memory.peak_bytes()
    speed.file_bytes = speed.file_bytes or tensor_bytes(Path(work.path))
    return speed


def _main(program: str, work: dict[str, Any]) -> None:
    try:
        print(json.dumps(asdict(measure(program, Work(**work)))))
    except Exception as error:  # whatever a program raises is the answer
        print(json.dumps({"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}))


if __name__ == "__main__":
    _main(sys.argv[1], json.loads(sys.argv[2]))
