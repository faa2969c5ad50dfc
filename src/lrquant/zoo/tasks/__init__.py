"""Tasks for lm-eval on the bundled data."""
