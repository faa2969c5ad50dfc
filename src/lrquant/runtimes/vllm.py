"""vLLM: compressed-tensors' schemes, and the kernels that run them.

scripts/vllm_verdicts.py queries vLLM's own classes, and a test compares this file with their answers. Only Humming
quantizes activations below 8 bits. If vLLM prefers another kernel, activations are not quantized, and
`--linear-backend humming` selects Humming.
"""

from lrquant.runtimes.runtime import Runtime, Verdict, no, yes
from lrquant.runtimes.stored_format import StoredFormat

VERSION, DATE = "0.32.0", "2026-11-25"
ADA, HOPPER = 89, 90
CAPABILITIES = {75: "Turing", 80: "Ampere", 89: "Ada", 90: "Hopper", 100: "Blackwell"}
_MARLIN_GROUPS = (None, 32, 64, 128)
_MACHETE_GROUPS = (None, 64, 128)
_CALLED = "it does not support lrquant's added biases or run-time transforms"


def scheme_of(stored: StoredFormat, capability: int | None = None) -> str | None:
    """The class by which vLLM reads the linears, without its prefix; None: none.

    `capability`: of a GPU, times ten; None: the machine does not matter, or is a CPU.
    """
    weights, inputs = stored.weights, stored.inputs
    if weights is None:
        return "dense"
    if weights.kind == "float" and weights.bits == 4:
        return "W4A4Fp4" if weights.strategy == "tensor_group" else "W4A4Mxfp4"
    if weights.kind == "float" and weights.group_size == 32:
        return "W8A8Mxfp8"
    if weights.kind == "float":
        products = inputs is not None and (capability is None or capability >= ADA)
        return "W8A8Fp8" if products else "W8A16Fp8"
    packed = stored.container == "pack-quantized"
    if inputs is None:
        return "WNA16" if packed else None
    if inputs.kind != "int":
        taken = weights.symmetric and weights.bits == 4 and stored.group_size and inputs.symmetric
        return "W4A8Fp8" if taken and capability == HOPPER else None
    if packed:
        return f"WNA{inputs.bits}Int" if inputs.symmetric and inputs.bits in (4, 8) else None
    if not weights.symmetric or inputs.bits != 8:
        return None
    if weights.bits == 4:
        return "W4A8Int"
    return "W8A8Int8" if stored.group_size is None else None


def kernel_on_cuda(stored: StoredFormat, capability: int) -> str | None:
    """The kernel on a GPU of this compute capability (times ten) for packed integers; None: not packed integers."""
    scheme, bits = scheme_of(stored), stored.wbits
    if scheme == "W8A8Int8":
        return "CutlassInt8ScaledMM"
    if scheme == "W4A8Int":
        return "Humming"
    if scheme is None or not scheme.startswith("WNA"):
        return None
    if capability == HOPPER:
        return "Machete" if bits in (4, 8) and stored.group_size in _MACHETE_GROUPS else "Humming"
    if stored.group_size in _MARLIN_GROUPS and (bits == 4 or (bits == 8 and stored.symmetric)):
        return "Marlin"
    triton = bits == 4 and (stored.group_size or 0) >= 32
    return "TritonW4A16" if triton else "Humming"


def _refusal(stored: StoredFormat) -> Verdict | None:
    """What holds on every machine."""
    if stored.needs_lrquant:
        return no(_CALLED)
    if scheme_of(stored) is not None:
        return no("its zero points are padded for transformers; use symmetric weights") if _padded(stored) else None
    if stored.inputs is not None and stored.inputs.kind != "int":
        return no("FP8 activations need FP8 weights or, on Hopper, symmetric 4-bit integers in groups")
    if stored.inputs is not None and stored.wbits == stored.abits == 8:
        return no("8-bit activations need symmetric weights with one scale per row")
    if stored.abits not in (4, 8):
        return no(f"no scheme for {stored.abits}-bit activations")
    if stored.wbits == 8:
        return no(f"no scheme for 8-bit weights with {stored.abits}-bit activations")
    return no("activations below 8 bits must be symmetric")


def _padded(stored: StoredFormat) -> bool:
    return stored.pads_zero_points and not stored.symmetric


def _on_cuda(stored: StoredFormat) -> Verdict:
    if scheme_of(stored, HOPPER) == "W4A8Fp8":
        return yes("CUTLASS W4A8 products, only on Hopper")
    refused = _refusal(stored)
    if refused is not None:
        return refused
    scheme = scheme_of(stored)
    if scheme == "dense":
        return yes("in floating point; the weights are stored dense")
    if not stored.integers:
        return _floats_on_cuda(stored)
    kernels = {capability: kernel_on_cuda(stored, capability) for capability in CAPABILITIES}
    if stored.all_bits:
        return yes("Marlin, Machete or Humming, depending on each linear's bits")
    usual = kernels[80]
    how = f"{usual}" + (f", {kernels[HOPPER]} on Hopper" if kernels[HOPPER] != usual else "")
    if scheme == "W8A8Int8":
        return yes("CUTLASS int8 products")
    if scheme == "W4A8Int":
        return yes("Humming, as W4A16: activations are not quantized", rounds=False)
    if stored.inputs is not None and set(kernels.values()) != {"Humming"}:
        return yes(f"Humming on request, otherwise {how}, which do not quantize activations")
    return yes(how)


def _floats_on_cuda(stored: StoredFormat) -> Verdict:
    scheme = scheme_of(stored)
    if scheme == "W4A4Fp4":
        if stored.inputs is None:
            return yes("Marlin, weight-only")
        return yes("FP4 products on Blackwell; Marlin on older GPUs, which does not quantize activations")
    if scheme == "W4A4Mxfp4":
        rounds = stored.inputs is None
        return yes("Marlin" if rounds else "Marlin, weight-only: activations are not quantized", rounds=rounds)
    if scheme == "W8A8Mxfp8":
        rounds = stored.inputs is None
        return yes("Marlin" if rounds else "Marlin, weight-only: activations are not quantized", rounds=rounds)
    if stored.inputs is None:
        return yes("Marlin, weight-only")
    return yes("FP8 products on Ada and newer; weight-only Marlin on older GPUs")


def _on_cpu(stored: StoredFormat) -> Verdict:
    refused = _refusal(stored)
    if refused is not None:
        return refused
    scheme = scheme_of(stored)
    if scheme == "dense":
        return yes("in floating point; the weights are stored dense")
    if scheme == "W8A8Int8":
        return yes("oneDNN int8 products")
    if scheme == "W4A8Int":
        return yes("Dynamic4bit")
    if not stored.integers:
        if stored.weights is not None and stored.weights.strategy == "block":
            return no("no kernel for FP8 blocks on the CPU that was tested")
        return yes("FP8 products") if scheme == "W8A8Fp8" else no("no kernel for such floats")
    bits = stored.all_bits or (stored.wbits,)
    if set(bits) != {4}:
        return no("its weight-only kernel has 4 bits")
    if stored.inputs is not None:
        return yes("CPUWNA16, which does not quantize activations", rounds=False)
    return yes("CPUWNA16")


def _command(stored: StoredFormat) -> str:
    packed = stored.inputs is not None and stored.integers and (scheme_of(stored) or "").startswith("WNA")
    return "vllm serve {path}" + (" --linear-backend humming" if packed else "")


_ASKED = "queried from its classes"
ON_CUDA = Runtime("vllm", "vLLM on NVIDIA GPUs", VERSION, DATE, _ASKED, _on_cuda, _command)
ON_CPU = Runtime("vllm-cpu", "vLLM on CPUs", VERSION, DATE, _ASKED, _on_cpu, lambda stored: "vllm serve {path}")
