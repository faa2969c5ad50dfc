"""The notebooks of examples/ were executed, are small, and run from top to bottom (here with fewer samples)."""

from pathlib import Path

import pytest

from tests.test_documents import ROOT, quickly
from tests.tiny import write_tiny

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_was_executed_without_an_error_and_is_small(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output.output_type != "error" for cell in cells for output in cell.outputs)
    assert sum(len(cell.outputs) > 0 for cell in cells) >= len(cells) - 1
    assert path.stat().st_size < 200_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    from run_notebooks import execute

    tiny = write_tiny(tmp_path / "tiny")
    book = nbformat.read(path, as_version=4)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.source = quickly(cell.source, tiny)
    assert execute(book).cells[-1].outputs


def test_there_are_two() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["adapt-to-new-text", "quantize-and-look-inside"]
