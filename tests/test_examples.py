"""The notebook in examples/: every cell, in a kernel as Jupyter starts it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "curate.ipynb"


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert all(not cell.outputs for cell in cells if cell.cell_type == "code")


def test_every_cell_of_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(NOTEBOOK.parents[1])
    monkeypatch.setenv("PYTHONPATH", root + os.pathsep + os.environ.get("PYTHONPATH", ""))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=400, kernel_name="python3", resources=resources).execute()
    shown = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type in ("execute_result", "stream")
    ]
    texts = [str(output.get("text", output.get("data"))) for output in shown]
    assert any("rows, " in text and "rejected" in text for text in texts)
    # Bars of text; where ipywidgets is installed, widgets whose text is the bar at its start.
    bars = "".join(
        output.get("text") or output["data"].get("text/plain", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type in ("stream", "display_data")
    )
    for stage in ("difficulty", "dictionary", "features", "embedding", "selection", "emission"):
        assert re.search(rf"{stage}: .*\d.* rows", bars), stage
    widgets = json.dumps(notebook.metadata.get("widgets"), ensure_ascii=False)
    assert re.search(r"difficulty:\s*100%", bars + widgets)
    # Each source's weight is in the table of the mixture.
    assert any(
        all(name in text for name in ("weight", "arithmetic", "facts", "python")) for text in texts
    )
