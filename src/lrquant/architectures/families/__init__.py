"""One short file per model family, each of which defines `FAMILY`."""
