"""What progress and sizes look like."""

import io
from unittest import mock

from rich.console import Console

from lrquant.cli import console


def test_a_bar_is_drawn_once_there_is_something_to_count() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    with mock.patch.object(console, "err", screen), console.counting("Measuring") as told:
        assert screen.file.getvalue() == ""  # type: ignore[attr-defined]
        for _ in range(3):
            told(1, 3)
    drawn = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "3/3" in drawn
    assert "0/0" not in drawn


def test_sizes_are_gigabytes_from_a_thousand_megabytes_on() -> None:
    assert console.megabytes(999.9e6) == "999.9 MB"
    assert console.megabytes(13.26e9) == "13.26 GB"


def test_notes_break_between_words_on_a_terminal_and_not_at_all_elsewhere() -> None:
    line = "lrquant.load quantizes queries, keys and values"
    for terminal, lines in ((True, 2), (False, 1)):
        screen = Console(file=io.StringIO(), force_terminal=terminal, width=40, no_color=True, highlight=False)
        with mock.patch.object(console, "out", screen):
            console.note(line)
        said = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert len(said) == lines
        assert " ".join(each.strip() for each in said) == f"Note: {line}"
