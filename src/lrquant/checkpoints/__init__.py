"""Quantized checkpoints: written as compressed-tensors, read back by transformers, vLLM and `load`."""

from lrquant.checkpoints.loading import apply_attention_quantization, load, saved_recipe
from lrquant.checkpoints.saving import Sizes, check_save_dir, save

__all__ = ["Sizes", "apply_attention_quantization", "check_save_dir", "load", "save", "saved_recipe"]
