"""The notebook a new user opens first runs from top to bottom."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

_NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"


def test_the_quickstart_runs_and_stays_short():
    notebook = nbformat.read(_NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    lines = [line for cell in code[1:] for line in cell.source.splitlines() if line.strip()]
    assert len(lines) <= 40  # what its title says, the installing cell aside
    printed = "".join(
        output.get("text", "")
        for cell in code
        for output in cell.outputs
        if output.output_type == "stream"
    )
    loss = float(printed.split("training loss ")[1].split()[0])
    assert loss < 3.5  # uniform bytes cost ln 256 = 5.55 nats; byte frequencies alone about 3.5
    assert "QTensor(ternary" in printed
