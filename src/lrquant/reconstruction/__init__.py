"""The engine: one block at a time, learn its transformation and clipping, freeze, go on."""

from lrquant.reconstruction.engine import Present, Reconstruction, gather_statistics, reconstruct
from lrquant.reconstruction.records import BlockRecord

__all__ = ["BlockRecord", "Present", "Reconstruction", "gather_statistics", "reconstruct"]
