"""Model families: where the blocks are, and which of their channels can be rescaled."""

from lrquant.architectures.family import (
    AnyFamily,
    Family,
    FoundFamily,
    MultimodalFamily,
    ResidualStream,
    Stage,
    Tower,
    family_names,
    family_of,
)

__all__ = [
    "AnyFamily",
    "Family",
    "FoundFamily",
    "MultimodalFamily",
    "ResidualStream",
    "Stage",
    "Tower",
    "family_names",
    "family_of",
]
