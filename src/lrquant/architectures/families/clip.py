"""CLIP's vision tower: alone, in its image classifier, or in a LLaVA."""

from typing import Any

from lrquant.architectures.family import Family
from lrquant.architectures.vision_encoder import vision_encoder
from lrquant.transforms import Equivalence


def equivalences(config: Any) -> tuple[Equivalence, ...]:
    vision = getattr(config, "vision_config", config)
    heads = vision.num_attention_heads
    norms = "layer_norm1", "layer_norm2"
    return vision_encoder(heads, vision.hidden_size // heads, attention="self_attn", output="out_proj", norms=norms)


FAMILY = Family("clip", ("clip", "clip_vision_model"), "vision_model.encoder.layers", equivalences, tower="vision")
