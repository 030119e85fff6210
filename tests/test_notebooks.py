"""The notebooks run from top to bottom, and show what they did."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    shown = [kinds(cell) for cell in notebook.cells if cell.cell_type == "code"]
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [kinds(cell) for cell in notebook.cells if cell.cell_type == "code"] == shown
    assert any("image/png" in kind for kind in shown)


def kinds(cell: nbformat.NotebookNode) -> set[str]:
    """What a cell shows: text, pictures."""
    outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return {kind for output in outputs for kind in output.get("data", {output.output_type: ""}) if kind != "text/plain"}


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} >= {"evaluation", "samplers", "steering"}
