"""Execute the notebooks of examples/ and keep their outputs: `python scripts/run_notebooks.py`, a few minutes."""

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"


def execute(book: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Run all cells in an empty folder; what they write is thrown away, what they show is kept."""
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(book, timeout=1200, resources={"metadata": {"path": folder}}).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # times of day
        if cell.cell_type == "code":  # warnings of other libraries about this machine
            cell.outputs = [shown for shown in cell.outputs if shown.get("name") != "stderr"]
    return book


if __name__ == "__main__":
    for path in sorted(EXAMPLES.glob("*.ipynb")):
        nbformat.write(execute(nbformat.read(path, as_version=4)), path)
