"""What `benchmarks/peers.py` asks of every method, and how the answer is measured: the same for lrquant and its peers.

A job is a JSON file; the answer is a JSON file beside it. A peer's environment has no lrquant in it: there, the files
on perplexity and memory, which need torch alone, are read from the source tree, so that one piece of code measures all.
"""

import importlib
import importlib.util
import json
import struct
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Job:
    """One method at one number format with one seed."""

    method: str  # the script's own name of it
    numbers: dict[str, Any]  # the number format, in the words of lrquant's recipe
    recipe: dict[str, Any] | None  # lrquant's, whole
    seed: int
    threads: int
    iterations: int | None  # AutoRound's, in place of its recipe's
    model: str  # a folder
    tensors: str  # a file with `calibration`, (samples, seqlen), and each text's tokens
    texts: list[str]
    seqlen: int
    windows: int
    source: str  # the folder that lrquant lies in
    folder: str  # to work in

    @property
    def floats(self) -> str | None:
        """`NVFP4`, `MXFP4`, or None for integers."""
        numbers = self.numbers.get("numbers", "int")
        return None if numbers == "int" else numbers.upper()

    @property
    def saved(self) -> Path:
        """Where the checkpoint goes."""
        return Path(self.folder, "saved")

    def samples(self) -> list[Tensor]:
        """The calibration samples, (1, seqlen) each."""
        return list(load_file(self.tensors)["calibration"].unsqueeze(1))

    def load(self) -> tuple[Any, Any]:
        """The model in float32, and its tokenizer."""
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(self.model)


def run(
    quantize: Callable[[Job], Any],
    model_of: Callable[[Any], Any],
    save: Callable[[Job, Any], None],
) -> None:
    """Do the job that the command line names: quantize, note time and memory, evaluate, save, write the answer."""
    told = json.loads(Path(sys.argv[1]).read_text())
    job = Job(**{field.name: told[field.name] for field in fields(Job)})
    measure = module_of(job.source, "evaluation.perplexity").perplexity
    memory = module_of(job.source, "runtime.memory").PeakMemory()
    torch.manual_seed(job.seed)
    torch.set_num_threads(job.threads)
    began, processor = time.perf_counter(), time.process_time()
    result = quantize(job)
    answer: dict[str, Any] = {
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - processor,
        "peak_bytes": memory.peak_bytes(),
    }
    tensors, model = load_file(job.tensors), model_of(result)
    answer["perplexity"] = {text: measure(model, tensors[text], job.seqlen, job.windows).value for text in job.texts}
    try:
        save(job, result)
        answer["bytes"] = checkpoint_bytes(job.saved)
    except Exception as error:  # what measures well and has no file format for these numbers still counts
        answer["bytes"], answer["unsaved"] = None, f"{type(error).__name__}: {error}".splitlines()[0][:200]
    Path(job.folder, "answer.json").write_text(json.dumps(answer))


def module_of(source: str, name: str) -> Any:
    """The module `lrquant.NAME`: the installed one, or the file alone where lrquant's own imports cannot be met."""
    if "lrquant" not in sys.modules and importlib.util.find_spec("lrquant") is None:
        for package in ("lrquant", "lrquant.evaluation"):
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(Path(source, *package.split(".")))]
    return importlib.import_module(f"lrquant.{name}")


def checkpoint_bytes(folder: Path) -> int:
    """Bytes of all tensors in `folder`, float32 and float64 counted at 16 bits.

    Some packages leave norms, embeddings and scales in the precision that they computed in, which says nothing of them:
    a model for use is in 16 bits.
    """
    total = 0
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                start, end = tensor["data_offsets"]
                total += (end - start) // {"F32": 2, "F64": 4}.get(tensor["dtype"], 1)
    return total
