"""How a scheme is stored on disk, and how loaders dequantize it.

Integers are packed `bits` bits each (`pack-quantized`), except 8-bit weights with quantized activations, which
are `int-quantized` as the int8 kernels want them. Asymmetric packed weights need care, because transformers
reserves one zero point per group where the packed zero points are fewer (compressed-tensors 0.18 to 0.20):

- weight-only checkpoints keep the packed zero points, which vLLM reads, and ask transformers to dequantize while
  it loads (`dequantize: true`). That computes (q − z)·s in the scale's own dtype: see `product_dtype`.
- CLIP's and SigLIP's code fills the weights of linears whether they have any or not (transformers 5.23), and
  stumbles over packed ones: theirs are `int-quantized` too, a byte each, unless they are dequantized on load.
- with quantized activations the dequantizing path would drop the activations' scheme, and no runtime has
  kernels for the packed form; the packed zero points are padded with zero rows to the reserved shape.

Symmetric 4-bit weights under 8-bit integer activations are `int-quantized` too: vLLM's kernels read them so, and pack
them themselves. Other numbers lie as compressed-tensors packs them. Whoever unpacks scales of few bits multiplies in
float32 and rounds to bfloat16, whatever the model's precision (`Scales.unpacked`).
"""

import torch
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationScheme
from torch import nn

from lrquant.formats.integers import Integers
from lrquant.formats.number_format import NumberFormat
from lrquant.formats.presets import format_of
from lrquant.formats.schemes import Scheme


def storage_format(scheme: Scheme, whole: bool = False) -> CompressionFormat:
    """How a checkpoint of this scheme holds its weights; `whole`: those of a block that cannot do without them."""
    weights = _weights(scheme)
    if weights is None:
        return CompressionFormat.dense
    if not isinstance(weights.elements, Integers):
        both = QuantizationScheme(targets=[], weights=scheme.weights, input_activations=scheme.inputs)
        return infer_module_format(nn.Linear, both)
    if _takes_bytes(scheme) or (whole and not dequantized_on_load(scheme)):
        return CompressionFormat.int_quantized
    return CompressionFormat.pack_quantized


def _weights(scheme: Scheme) -> NumberFormat | None:
    return None if scheme.weights is None else format_of(scheme.weights)


def packs_numbers(scheme: Scheme) -> bool:
    """Whether a checkpoint has no tensor `weight` of a linear, and no loader makes one before the first call."""
    weights = _weights(scheme)
    packed = weights is not None and not isinstance(weights.elements, Integers) and weights.bits < 8
    return packed and not dequantized_on_load(scheme)


def _takes_bytes(scheme: Scheme) -> bool:
    """Whether kernels exist that want a byte for each of these integers."""
    weights, inputs = scheme.weights, scheme.inputs
    if weights is None or inputs is None or inputs.type != weights.type:
        return False
    return weights.num_bits == 8 or (weights.num_bits == 4 and inputs.num_bits == 8 and weights.symmetric)


def dequantized_on_load(scheme: Scheme) -> bool:
    """Whether plain transformers dequantizes the weights when it loads them, instead of at the first call."""
    weights = _weights(scheme)
    if weights is None or scheme.inputs is not None or scheme.mixed:  # on load there is one format for all
        return False
    return weights.scales.unpacked is not None or not weights.symmetric


def product_dtype(scheme: Scheme, storage_dtype: torch.dtype) -> torch.dtype:
    """The precision in which a loader computes (q − z)·s before it casts to the model's dtype."""
    weights = _weights(scheme)
    if weights is not None and weights.scales.unpacked is not None:
        return weights.scales.unpacked
    return storage_dtype if dequantized_on_load(scheme) else torch.float32


def checkpoint_dtype(scheme: Scheme, original: torch.dtype) -> torch.dtype:
    """The precision that a checkpoint names as its own, in which norms, biases and plain scales are stored.

    Plain transformers multiplies what it unpacked with inputs of the model's precision: that has to be the same
    (compressed-tensors 0.18 to 0.20).
    """
    weights = _weights(scheme)
    unpacked = None if weights is None or scheme.inputs is None else weights.scales.unpacked
    return unpacked or original


def pads_zero_points(scheme: Scheme, whole: bool = False) -> bool:
    """Whether zero points are stored padded, because plain transformers unpacks them to a multiple of the pack size."""
    return (
        storage_format(scheme, whole) is CompressionFormat.pack_quantized
        and not dequantized_on_load(scheme)
        and scheme.weights is not None
        and not scheme.weights.symmetric
    )
