"""A run accounts for its time."""

import time
from pathlib import Path

import lrquant
from tests.tiny import SETTINGS, write_tiny


def test_parts_add_up_to_the_run(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny")
    recipe = lrquant.Recipe.preset("lrquant+", **SETTINGS)
    began = time.perf_counter()
    quantized = lrquant.quantize(str(tmp_path / "tiny"), recipe, save_dir=tmp_path / "out", report=True)
    took = time.perf_counter() - began
    parts = quantized.profile
    assert {"load", "capture", "steps", "measure", "freeze", "advance", "write", "own-branch targets"} <= set(parts)
    assert sum(parts.values()) <= took
    assert sum(parts.values()) >= 0.95 * quantized.seconds
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Where the time went" in page
    assert "<td>full-precision pass and statistics</td>" in page
