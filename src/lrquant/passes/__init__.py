"""What may come before, between or after the reconstruction of blocks."""
