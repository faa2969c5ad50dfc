"""Function-preserving reparameterisations of a block, as pure functions of its parameters."""

from lrquant.transforms.equivalence import Edits, Equivalence, Reparameterized, applied, materialize, reparameterize
from lrquant.transforms.smoothing import NormToLinears, QueryKey, UpToDown, ValueToOutput

__all__ = [
    "Edits",
    "Equivalence",
    "NormToLinears",
    "QueryKey",
    "Reparameterized",
    "UpToDown",
    "ValueToOutput",
    "applied",
    "materialize",
    "reparameterize",
]
