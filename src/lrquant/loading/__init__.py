"""Models, checkpoints and their files, read with care."""
