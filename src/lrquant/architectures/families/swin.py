"""Swin: ViT's block inside windows, with a relative position bias, in stages that merge patches between them.

The bias is added to the scores q·k, which the transformations leave as they are, and windows only say which
tokens meet. But a picture whose sides are no multiples of the window is padded with zeros *behind* the norm:
a shift of the norm's output would move the real tokens and not the padding, so attention's norm takes none.
"""

from typing import Any

from lrquant.architectures.family import Family
from lrquant.architectures.vision_encoder import vision_encoder
from lrquant.transforms import Equivalence


def equivalences(config: Any, stage: int) -> tuple[Equivalence, ...]:
    heads = config.num_heads[stage]
    head_dim = config.embed_dim * 2**stage // heads
    norms = "layernorm_before", "layernorm_after"
    return vision_encoder(heads, head_dim, attention="attention", output="o_proj", norms=norms, shift_attention=False)


FAMILY = Family("swin", ("swin",), "swin.encoder.layers.*.blocks", equivalences, tower="vision")
