"""llama.cpp, after `lrquant export --to gguf`: which of its blocks hold which integers.

    Q4_0, Q5_0, Q8_0    w = d·c              c from −2ⁿ⁻¹ to 2ⁿ⁻¹ − 1
    Q4_1, Q5_1          w = d·u + m          u from 0 to 2ⁿ − 1

each with one d (and m), in float16, for 32 weights of a row. A weight (q − z)·s without a zero point is the first with
d = s. So is one whose q − z fits c, which takes one more bit; llama.cpp has no three-bit block of this kind, so two and
three bits lose nothing by it. Others are the second.
"""

from dataclasses import dataclass, replace

from lrquant.errors import UsageError
from lrquant.runtimes.runtime import Runtime, Verdict, no, yes
from lrquant.runtimes.stored_format import Numbers, StoredFormat

BLOCK = 32  # weights
# Model types that are exported (export/gguf/families.py).
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")


@dataclass(frozen=True)
class BlockFormat:
    """One of llama.cpp's formats for integers."""

    name: str  # gguf.GGMLQuantizationType's
    bits: int
    minimum: bool = False  # whether blocks have one beside the scale

    def holds(self, low: int, high: int) -> bool:
        """Whether every integer from `low` to `high` is a code of it, times the scale."""
        return not self.minimum and -(1 << self.bits - 1) <= low and high < 1 << self.bits - 1


BLOCKS = (
    BlockFormat("Q4_0", 4),
    BlockFormat("Q4_1", 4, minimum=True),
    BlockFormat("Q5_0", 5),
    BlockFormat("Q5_1", 5, minimum=True),
    BlockFormat("Q8_0", 8),
)


def block_format(numbers: Numbers) -> BlockFormat:
    """The smallest format that holds weights of `numbers`.

    Raises:
        UsageError: none does.
    """
    if numbers.kind != "int":
        raise UsageError(f"llama.cpp's blocks of {BLOCK} hold integers, not {numbers.bits}-bit floats")
    if numbers.group_size is not None and numbers.group_size % BLOCK:
        raise UsageError(
            f"groups of {numbers.group_size}: llama.cpp has one scale for {BLOCK} weights, so groups must be multiples "
            f"of {BLOCK} or entire rows; use --group-size {BLOCK}"
        )
    low, high = -(1 << numbers.bits - 1), (1 << numbers.bits - 1) - 1
    if not numbers.symmetric:
        low, high = low - high, high - low
    for known in BLOCKS:
        if known.holds(low, high) or (known.minimum and not numbers.symmetric and known.bits == numbers.bits):
            return known
    raise UsageError(
        f"asymmetric {numbers.bits}-bit weights: llama.cpp's largest block has 8 bits without a minimum; "
        "use --symmetric"
    )


def _judge(stored: StoredFormat) -> Verdict:
    if stored.needs_lrquant:
        return no("it does not support lrquant's added biases or run-time transforms")
    if stored.model_type is not None and stored.model_type not in MODEL_TYPES:
        return no(f"{stored.model_type} models cannot be exported to GGUF")
    if stored.weights is None:
        return yes("in floating point")
    try:
        found = {block_format(replace(stored.weights, bits=bits)).name for bits in stored.all_bits or (stored.wbits,)}
    except UsageError as error:
        return no(str(error).partition("; take")[0])
    how = f"{', '.join(sorted(found))}, after lrquant export --to gguf"
    if stored.inputs is None:
        return yes(how)
    return yes(f"{how}; llama.cpp rounds activations itself", rounds=False)


RUNTIME = Runtime(
    "llama.cpp", "llama.cpp", "b11549 (xllamacpp 2026.10)", "2026-11-25", "the tests run it", _judge,
    lambda stored: "lrquant export {path} --to gguf {path}.gguf && llama-server -m {path}.gguf",
)  # fmt: skip
