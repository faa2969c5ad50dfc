"""ViT: the class token stands among the patches and passes the blocks as they do."""

from typing import Any

from lrquant.architectures.family import Family
from lrquant.architectures.vision_encoder import vision_encoder
from lrquant.transforms import Equivalence


def equivalences(config: Any) -> tuple[Equivalence, ...]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    norms = "layernorm_before", "layernorm_after"
    return vision_encoder(config.num_attention_heads, head_dim, attention="attention", output="o_proj", norms=norms)


FAMILY = Family("vit", ("vit",), "vit.layers", equivalences, tower="vision")
