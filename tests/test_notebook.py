"""The notebook runs, and what is saved in it is an output of a run."""

from __future__ import annotations

import re

import nbclient
import nbformat
import pytest
from helpers import ROOT, environment

NOTEBOOK = ROOT / "demo" / "sbam_visualize.ipynb"


def outputs(notebook) -> list:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(notebook) -> list:
    return [output for output in outputs(notebook) if "image/png" in output.get("data", {})]


@pytest.fixture(scope="module")
def saved():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_runs(saved, monkeypatch):
    for name, value in environment(EPOCHS="1").items():
        monkeypatch.setenv(name, value)
    fresh = nbformat.from_dict(saved)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    nbclient.NotebookClient(fresh, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    assert len(pictures(fresh)) == len(pictures(saved)) == 2
    assert not [output for output in outputs(fresh) if output.output_type == "error"]


def test_its_saved_outputs_are_of_a_run_and_name_no_place_of_a_machine(saved):
    nbformat.validate(saved)
    assert all(cell.execution_count and cell.outputs for cell in saved.cells[3:] if cell.cell_type == "code")
    text = "".join(str(output.get("text", "")) for output in outputs(saved))
    assert re.search(r"epoch +0 .*k-NN", text)
    assert not re.search(r"(?<!\w)/(tmp|home|root|work|usr)/|Warning|Traceback", NOTEBOOK.read_text())
