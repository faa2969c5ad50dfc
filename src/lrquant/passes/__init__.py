"""Passes: work before, between or after the reconstruction of blocks."""
