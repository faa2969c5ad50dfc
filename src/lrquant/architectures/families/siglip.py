"""SigLIP's vision tower: CLIP's block, without a class token."""

from lrquant.architectures.families.clip import equivalences
from lrquant.architectures.family import Family

FAMILY = Family(
    "siglip", ("siglip", "siglip_vision_model"), "vision_model.encoder.layers", equivalences, tower="vision"
)
