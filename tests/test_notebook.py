"""The notebook that newcomers open: it runs, and what is committed has been run and is small."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbclient is in the extra dev")

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cells) -> int:
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)


def test_what_is_committed_has_been_run_in_order_and_is_small():
    cells = code_cells(nbformat.read(NOTEBOOK, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]
    assert pictures(cells) == 3
    assert NOTEBOOK.stat().st_size < 300_000


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for package in ("lightning", "sklearn", "ipykernel"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    from nbclient import NotebookClient

    monkeypatch.delenv("MPLBACKEND", raising=False)  # of other tests: pictures belong into the cells
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    cells = code_cells(notebook)
    assert pictures(cells) == 3
    iou = next(o.text for c in cells for o in c.outputs if "mask IoU" in o.get("text", ""))
    assert float(iou.split()[-1]) > 0.8
