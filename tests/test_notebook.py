"""The notebook of the first hour: kept without outputs, valid, and executed at the smallest size."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.paths import ROOT

NOTEBOOK = ROOT / "docs" / "notebooks" / "first_hour.ipynb"


def test_it_is_kept_without_outputs_and_names_files_that_are() -> None:
    tree = json.loads(NOTEBOOK.read_text())
    code = [cell for cell in tree["cells"] if cell["cell_type"] == "code"]
    assert code and not [cell for cell in code if cell["outputs"] or cell["execution_count"]]
    for name in re.findall(r"\b(?:recipes|docs|scripts)/[\w/]+\.\w+", NOTEBOOK.read_text()):
        assert (ROOT / name).is_file(), name


@pytest.mark.slow
def test_it_runs_to_its_report(tmp_path: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    (settings,) = [cell for cell in book.cells if cell.source.startswith("SCALE")]
    settings.source = f"SCALE = 0.01\nOUT = {str(tmp_path)!r}"
    client = nbclient.NotebookClient(
        book, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()
    assert "<html" in (tmp_path / "report.html").read_text()[:200].lower()
    shown = [
        output for cell in book.cells for output in cell.get("outputs", []) if output["output_type"] == "display_data"
    ]
    kinds = {kind for output in shown for kind in output["data"]}
    assert {"image/png", "text/html"} <= kinds and any(
        "trials" in output["data"].get("text/html", "") for output in shown
    )
