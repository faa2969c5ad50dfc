"""docs/cli.md is what the command line says of itself."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_cli_reference_is_fresh() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "cli_reference.py"))
    fresh = (ROOT / "docs" / "cli.md").read_text() == script["reference"]()
    assert fresh, "docs/cli.md is stale: run python scripts/cli_reference.py"
