"""Quantized checkpoints as files: compressed-tensors, and what lies beside them."""

from lrquant.export.learned_parameters import load_learned, save_learned
from lrquant.export.saving import check_save_dir
from lrquant.export.sizes import Sizes
from lrquant.export.statistics_file import load_statistics, save_statistics_file

__all__ = [
    "Sizes",
    "check_save_dir",
    "load_learned",
    "load_statistics",
    "save_learned",
    "save_statistics_file",
]
