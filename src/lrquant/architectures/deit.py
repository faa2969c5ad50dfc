"""DeiT: ViT's block; the distillation token stands beside the class token and passes it as they all do."""

from lrquant.architectures.family import Family
from lrquant.architectures.vit import equivalences

FAMILY = Family("deit", ("deit",), "deit.layers", equivalences, tower="vision")
