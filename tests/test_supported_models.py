"""docs/supported-models.md says what is found; some of its rows are found again here."""

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "supported_models.py"))
PAGE = (ROOT / "docs" / "supported-models.md").read_text()


@pytest.mark.parametrize(
    ("heading", "model_type"),
    [
        ("Language models", "cohere"),
        ("Language models", "gptj"),
        ("Language models", "olmo2"),
        ("Hybrids", "bamba"),
        ("Encoders", "bert"),
        ("Multimodal", "mistral3"),
    ],
)
def test_a_row_of_the_page_is_what_is_found(heading: str, model_type: str) -> None:
    assert SCRIPT["row"](heading, model_type) in PAGE.splitlines()


def test_the_page_has_a_row_for_every_type() -> None:
    rows = [line.removeprefix("| ").split(" ")[0] for line in PAGE.splitlines() if line.startswith("| ")]
    listed = [model_type for types in SCRIPT["TYPES"].values() for model_type in types]
    assert set(listed) <= set(rows)
    assert len(listed) >= 60
