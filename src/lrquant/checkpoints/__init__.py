"""Quantized checkpoints: written as compressed-tensors, read back by transformers, vLLM and `load`."""

from lrquant.checkpoints.learned import load_learned, save_learned
from lrquant.checkpoints.loading import apply_attention_quantization, load, saved_recipe
from lrquant.checkpoints.saving import Sizes, check_save_dir
from lrquant.checkpoints.statistics import load_statistics, save_statistics_file

__all__ = [
    "Sizes",
    "apply_attention_quantization",
    "check_save_dir",
    "load",
    "load_learned",
    "load_statistics",
    "save_learned",
    "save_statistics_file",
    "saved_recipe",
]
