"""Integers as llama.cpp's blocks of 32 weights (runtimes/llama_cpp.py says which block holds which integers).

With a minimum, (q − z)·s = d·u + m has u = q − low, d = s and m = (low − z)·s, low being the integers' least: m is
rounded to float16. Without one, c = q − z and d = s.

Bits lie as in ggml's reference (gguf.quants): codes j and j + 16 of a block share a byte, the low half first; the fifth
bits follow d (and m) as one little-endian word.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from lrquant.errors import UsageError
from lrquant.formats.fake_quant import QuantizedWeight
from lrquant.runtimes.llama_cpp import BLOCK, BlockFormat

MOST_ERROR = 5e-4  # of the largest weight, where a minimum is rounded


def pack(weight: QuantizedWeight, bits: int, known: BlockFormat) -> NDArray[np.uint8]:
    """`weight` (out, in) of `bits` bits as rows of blocks, (out, bytes).

    Raises:
        UsageError: float16 does not hold the scales.
    """
    rows, width = weight.codes.shape
    scale = weight.scale.float().repeat_interleave(width // BLOCK // weight.scale.shape[1], dim=1)
    if not torch.equal(scale.half().float(), scale):
        raise UsageError(
            f"scales of {str(weight.scale.dtype).removeprefix('torch.')} precision, which do not fit llama.cpp's "
            "float16; quantize the model again with --store half"
        )
    integers = weight.codes.to(torch.int16).reshape(rows, -1, BLOCK)
    fields = [_bytes(scale.half())]
    zero = torch.zeros_like(scale) if weight.zero is None else weight.zero.float()
    zero = zero.repeat_interleave(scale.shape[1] // zero.shape[1], dim=1)
    if known.minimum:
        low = -(1 << bits - 1)
        codes = integers - low
        fields.append(_bytes(((low - zero) * scale).half()))
    else:
        codes = integers - zero.to(torch.int16)[..., None]
        if known.bits < 8:
            codes += 1 << known.bits - 1
    return np.concatenate(fields + _codes(codes.numpy(), known.bits), axis=-1).reshape(rows, -1)


def _codes(codes: NDArray[np.int16], bits: int) -> list[NDArray[np.uint8]]:
    """The fields of blocks that hold `codes` (out, blocks, 32)."""
    if bits == 8:
        return [codes.astype(np.int8).view(np.uint8)]
    low, high = np.split((codes & 15).astype(np.uint8), 2, axis=-1)
    halves = low | high << np.uint8(4)
    if bits == 4:
        return [halves]
    return [np.packbits((codes >> 4).astype(np.uint8), axis=-1, bitorder="little"), halves]


def _bytes(values: torch.Tensor) -> NDArray[np.uint8]:
    """(out, blocks) float16 as bytes, (out, blocks, 2)."""
    return values.contiguous().numpy().view(np.uint8).reshape(*values.shape, 2)


def largest_error(packed: NDArray[np.uint8], weight: QuantizedWeight, known: BlockFormat) -> float:
    """How far the blocks are from `weight` at most, as a share of its largest magnitude; ggml's arithmetic."""
    from gguf import GGMLQuantizationType, dequantize

    exact = weight.dequantized().numpy()
    largest = np.abs(exact).max()
    error = np.abs(dequantize(packed, GGMLQuantizationType[known.name]) - exact).max()
    return float(error / largest) if error else 0.0
