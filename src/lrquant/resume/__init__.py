"""What an unfinished run leaves behind, so that the same command goes on from there."""
