"""How a scheme is laid out on disk, and what its loaders compute from that.

Integers are packed `bits` bits each (`pack-quantized`), except 8-bit weights with quantized activations, which
are `int-quantized` as the int8 kernels want them. Asymmetric packed weights need care, because transformers
reserves one zero point per group where the packed zero points are fewer (compressed-tensors 0.18 to 0.20):

- weight-only checkpoints keep the packed zero points, which vLLM reads, and ask transformers to dequantize while
  it loads (`dequantize: true`). That computes (q − z)·s in the scale's own dtype: see `product_dtype`.
- CLIP's and SigLIP's code fills the weights of linears whether they have any or not (transformers 5.23), and
  stumbles over packed ones: theirs are `int-quantized` too, a byte each, unless they are dequantized on load.
- with quantized activations the dequantizing path would drop the activations' scheme, and no runtime has
  kernels for the packed form; the packed zero points are padded with zero rows to the reserved shape.

Symmetric 4-bit weights under 8-bit activations are `int-quantized` too: vLLM's kernels read them so, and pack them
themselves. Four-bit floats are packed two to a byte, their scales a byte each; whoever unpacks them multiplies in
float32 and rounds to bfloat16, whatever the model's precision.
"""

import torch
from compressed_tensors.config import CompressionFormat

from lrquant.formats.qparams import Grid, Numbers
from lrquant.formats.schemes import Scheme


def storage_format(scheme: Scheme, whole: bool = False) -> CompressionFormat:
    """How a checkpoint of this scheme holds its weights; `whole`: those of a block that cannot do without them."""
    if scheme.weights is None:
        return CompressionFormat.dense
    if _is_float(scheme):
        return _FLOAT_FORMATS[Grid.of(scheme.weights).numbers]
    if _takes_bytes(scheme) or (whole and not dequantized_on_load(scheme)):
        return CompressionFormat.int_quantized
    return CompressionFormat.pack_quantized


_FLOAT_FORMATS: dict[Numbers, CompressionFormat] = {
    "nvfp4": CompressionFormat.nvfp4_pack_quantized,
    "mxfp4": CompressionFormat.mxfp4_pack_quantized,
}


def _is_float(scheme: Scheme) -> bool:
    return scheme.weights is not None and scheme.weights.type == "float"


def _takes_bytes(scheme: Scheme) -> bool:
    """Whether kernels exist that want a byte for each of these integers."""
    weights, inputs = scheme.weights, scheme.inputs
    if weights is None or inputs is None:
        return False
    return weights.num_bits == 8 or (weights.num_bits == 4 and inputs.num_bits == 8 and weights.symmetric)


def dequantized_on_load(scheme: Scheme) -> bool:
    if scheme.weights is None or scheme.inputs is not None or scheme.bits:  # on load there is one format for all
        return False
    return _is_float(scheme) or not scheme.weights.symmetric


def product_dtype(scheme: Scheme, storage_dtype: torch.dtype) -> torch.dtype:
    """The precision in which a loader computes (q − z)·s before it casts to the model's dtype."""
    if _is_float(scheme):
        return torch.bfloat16
    return storage_dtype if dequantized_on_load(scheme) else torch.float32


def checkpoint_dtype(scheme: Scheme, original: torch.dtype) -> torch.dtype:
    """The precision that a checkpoint names as its own, in which norms, biases and integers' scales are stored.

    Plain transformers multiplies four-bit floats as bfloat16 with inputs of the model's precision: that has to be
    bfloat16 too (compressed-tensors 0.18 to 0.20).
    """
    return torch.bfloat16 if _is_float(scheme) and scheme.inputs is not None else original


def pads_zero_points(scheme: Scheme, whole: bool = False) -> bool:
    return (
        storage_format(scheme, whole) is CompressionFormat.pack_quantized
        and not dequantized_on_load(scheme)
        and scheme.weights is not None
        and not scheme.weights.symmetric
    )
