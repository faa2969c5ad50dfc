"""The table's rows, and functions over all of them."""

from lrquant.errors import UsageError
from lrquant.runtimes.llama_cpp import RUNTIME as LLAMA_CPP
from lrquant.runtimes.runtime import Runtime, Verdict
from lrquant.runtimes.sglang import RUNTIME as SGLANG
from lrquant.runtimes.stored_format import StoredFormat
from lrquant.runtimes.transformers import RUNTIME as TRANSFORMERS
from lrquant.runtimes.vllm import ON_CPU, ON_CUDA

RUNTIMES = (ON_CUDA, ON_CPU, SGLANG, LLAMA_CPP, TRANSFORMERS)


def by_key(key: str) -> Runtime:
    """The row that `--for` calls `key`.

    Raises:
        UsageError: there is none.
    """
    for runtime in RUNTIMES:
        if runtime.key == key:
            return runtime
    raise UsageError(f"no runtime {key!r}: there are {', '.join(runtime.key for runtime in RUNTIMES)}")


def verdicts(stored: StoredFormat) -> dict[str, Verdict]:
    """What every program says of `stored`, by the program's name."""
    return {runtime.name: runtime.judge(stored) for runtime in RUNTIMES}


def served(stored: StoredFormat) -> bool:
    """Whether a program other than transformers, which simulates, computes with `stored` as it was learned."""
    found = (runtime.judge(stored) for runtime in RUNTIMES if runtime.key != "transformers")
    return any(verdict.runs and verdict.rounds for verdict in found)


def commands(stored: StoredFormat, path: str) -> dict[str, str]:
    """How programs that compute with `stored` are started on the checkpoint at `path`, by the program's name."""
    found = {}
    for runtime in RUNTIMES:
        verdict = runtime.judge(stored)
        if runtime.key != "transformers" and verdict.runs and verdict.rounds:
            found[runtime.name] = runtime.command(stored).format(path=path)
    return found
