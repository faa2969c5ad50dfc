"""Plain transformers, which computes with what compressed-tensors unpacks."""

from lrquant.runtimes.runtime import Runtime, Verdict, yes
from lrquant.runtimes.stored_format import StoredFormat


def _judge(stored: StoredFormat) -> Verdict:
    if stored.needs_lrquant:
        return yes("after import lrquant; dense linears in floating point, not faster")
    if stored.weights is None:
        return yes("in floating point; the weights are stored dense")
    if stored.inputs is None:
        return yes("as dense linears: weights are unpacked when loading, so neither faster nor smaller in memory")
    return yes("weights are unpacked and activations quantized: correct results, but slower")


RUNTIME = Runtime(
    "transformers", "transformers", "5.24.0", "2026-11-25", "the tests run it", _judge,
    lambda stored: "lrquant eval {path} --ppl zoo:pydoc",
)  # fmt: skip
