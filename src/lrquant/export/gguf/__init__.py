"""GGUF, llama.cpp's model file: weights in blocks, the model's numbers, the tokenizer."""

from lrquant.export.gguf.writer import export_gguf

__all__ = ["export_gguf"]
