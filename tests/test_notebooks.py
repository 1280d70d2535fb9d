from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
FAST = "quickstart"  # the others take about a minute each
# Goes before its cells: the measurement starts a process for each pipeline, and has tests of its own.
NO_MEMORY = """import compress.evaluate.cost
compress.evaluate.cost.peak_memory = lambda *_: {"peak_memory_bytes": 1, "method": "none"}"""


@pytest.mark.parametrize(
    "file",
    [pytest.param(file, marks=[] if file.stem == FAST else pytest.mark.slow) for file in NOTEBOOKS],
    ids=lambda file: file.stem,
)
def test_runs_from_top_to_bottom(file, tmp_path):
    notebook = nbformat.read(file, as_version=4)
    if file.stem == FAST:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(NO_MEMORY))
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_is_kept_without_outputs(file):
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        assert cell.metadata == {}
