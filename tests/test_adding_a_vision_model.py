"""docs/adding-a-vision-model.md, followed to the letter."""

import re
from pathlib import Path

import pytest

from lrquant.architectures import family

PAGE = Path(__file__).parent.parent / "docs" / "adding-a-vision-model.md"
CODE = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def test_the_page_adds_a_vision_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    declaration, _, check = CODE
    assert len(declaration.splitlines()) < 40
    values: dict = {}
    exec(declaration, values)
    known = family._families() | dict.fromkeys(values["FAMILY"].model_types, values["FAMILY"])
    monkeypatch.setattr(family, "_families", lambda: known)
    exec(check, {})


def test_the_page_shows_a_multimodal_family_as_it_is() -> None:
    values: dict = {}
    exec(CODE[1], values)
    assert values["FAMILY"] == family._families()["llava"]
