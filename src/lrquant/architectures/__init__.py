"""Model families: where the blocks are, and which of their channels may be rescaled."""

from lrquant.architectures.family import Family, MultimodalFamily, Stage, Tower, family_names, family_of

__all__ = ["Family", "MultimodalFamily", "Stage", "Tower", "family_names", "family_of"]
