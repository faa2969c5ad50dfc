"""SGLang on NVIDIA GPUs, read from its sources."""

from lrquant.runtimes.runtime import Runtime, Verdict, no, yes
from lrquant.runtimes.stored_format import StoredFormat

_MARLIN_GROUPS = (None, 32, 64, 128)


def _judge(stored: StoredFormat) -> Verdict:
    if stored.needs_lrquant:
        return no("it does not support lrquant's added biases or run-time transforms")
    if stored.weights is None:
        return yes("in floating point; the weights are stored dense")
    if not stored.integers:
        return _floats(stored)
    if stored.inputs is None:
        bits = stored.all_bits or (stored.wbits,)
        if not set(bits) <= {4, 8}:
            return no("its weight-only kernels have 4 and 8 bits")
        if stored.group_size not in _MARLIN_GROUPS:
            return no("Marlin needs groups of 32, 64 or 128, or entire rows")
        return yes("Marlin")
    if stored.wbits == stored.abits == 8 and stored.symmetric and stored.group_size is None:
        return yes("int8 products")
    if stored.wbits == stored.abits == 8:
        return no("8-bit activations need symmetric weights with one scale per row")
    return no(f"no scheme for integers W{stored.wbits}A{stored.abits}")


def _floats(stored: StoredFormat) -> Verdict:
    if stored.wbits == 8:
        return yes("FP8 products on Ada and newer")
    if stored.weights is not None and stored.weights.strategy == "tensor_group":
        return yes(
            "Marlin, weight-only" if stored.inputs is None else "FP4 products on Blackwell; Marlin on older GPUs"
        )
    return no("four-bit floats other than NVFP4 are not supported in linears")


RUNTIME = Runtime(
    "sglang", "SGLang on NVIDIA GPUs", "0.5.23", "2026-11-25", "reading its sources", _judge,
    lambda stored: "python -m sglang.launch_server --model-path {path}",
)  # fmt: skip
