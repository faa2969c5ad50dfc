"""Model families: where the blocks are, and which of their channels may be rescaled."""

from lrquant.architectures.family import (
    Family,
    MultimodalFamily,
    ResidualStream,
    Stage,
    Tower,
    family_names,
    family_of,
)

__all__ = ["Family", "MultimodalFamily", "ResidualStream", "Stage", "Tower", "family_names", "family_of"]
