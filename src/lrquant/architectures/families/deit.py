"""DeiT: ViT's block; the distillation token stands beside the class token and passes it as they all do."""

from lrquant.architectures.families.vit import equivalences
from lrquant.architectures.family import Family

FAMILY = Family("deit", ("deit",), "deit.layers", equivalences, tower="vision")
