"""Gemma 3 with pictures: a SigLIP tower before Gemma 3's language model."""

from lrquant.architectures.family import MultimodalFamily
from lrquant.architectures.llava import FAMILY as LLAVA

FAMILY = MultimodalFamily("gemma3", ("gemma3",), LLAVA.parts)
