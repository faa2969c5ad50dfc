"""Gemma 3 with pictures: a SigLIP tower before Gemma 3's language model."""

from lrquant.architectures.families.llava import FAMILY as LLAVA
from lrquant.architectures.family import MultimodalFamily

FAMILY = MultimodalFamily("gemma3", ("gemma3",), LLAVA.parts)
