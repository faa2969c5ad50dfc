"""Write docs/cli.md from the command line itself: `python scripts/cli_reference.py`. A test compares the two."""

import subprocess
import sys
from html import unescape
from pathlib import Path

TARGET = Path(__file__).parents[1] / "docs" / "cli.md"
PUBLISHED = """
## The published commands

`python main.py` and `python generate_act_scale_shift.py`, at the root of the repository, take the command lines of the
LRQuant papers as they stand; `--help` lists their options, and [methods](methods.md) says what they set.
"""


def reference() -> str:
    """Every command and option of `lrquant`, as typer's own documentation writer sees them."""
    command = [sys.executable, "-m", "typer", "lrquant.cli.main", "utils", "docs", "--name", "lrquant"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return unescape(text).strip() + "\n" + PUBLISHED


if __name__ == "__main__":
    TARGET.write_text(reference())
