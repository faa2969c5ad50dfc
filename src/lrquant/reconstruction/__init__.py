"""The engine: one block at a time, learn its transformation and clipping, freeze, go on."""

from lrquant.reconstruction.engine import gather_statistics, reconstruct
from lrquant.reconstruction.records import BlockRecord
from lrquant.reconstruction.result import Present, Reconstruction

__all__ = ["BlockRecord", "Present", "Reconstruction", "gather_statistics", "reconstruct"]
