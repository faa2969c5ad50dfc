"""The papers' script for activation statistics, which `main.py --let` starts from; a run gathers its own without it."""

from lrquant.cli.published import run_published, statistics

if __name__ == "__main__":
    run_published(statistics)
