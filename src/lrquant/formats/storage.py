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
"""

import torch
from compressed_tensors.config import CompressionFormat

from lrquant.formats.schemes import Scheme


def storage_format(scheme: Scheme, whole: bool = False) -> CompressionFormat:
    """How a checkpoint of this scheme holds its weights; `whole`: those of a block that cannot do without them."""
    if scheme.weights is None:
        return CompressionFormat.dense
    if (scheme.weights.num_bits == 8 and scheme.inputs is not None) or (whole and not dequantized_on_load(scheme)):
        return CompressionFormat.int_quantized
    return CompressionFormat.pack_quantized


def dequantized_on_load(scheme: Scheme) -> bool:
    return scheme.inputs is None and scheme.weights is not None and not scheme.weights.symmetric


def product_dtype(scheme: Scheme, storage_dtype: torch.dtype) -> torch.dtype:
    """The precision in which a loader computes (q − z)·s before it casts to the model's dtype."""
    return storage_dtype if dequantized_on_load(scheme) else torch.float32


def pads_zero_points(scheme: Scheme, whole: bool = False) -> bool:
    return (
        storage_format(scheme, whole) is CompressionFormat.pack_quantized
        and not dequantized_on_load(scheme)
        and scheme.weights is not None
        and not scheme.weights.symmetric
    )
