"""The notebooks of examples/ run from top to bottom, and were saved after such a run. Without Jupyter."""

import json
from pathlib import Path

import pytest
from test_finetune import write_tiny_model

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(ROOT.glob("examples/*.ipynb"))


def code_cells(notebook: Path) -> list[dict]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_cells_run(notebook, tmp_path, monkeypatch):
    # A folder with the name of the Hub id takes the place of the download.
    write_tiny_model(tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(notebook), start=1):
        # Errors name the notebook and the cell.
        exec(compile("".join(cell["source"]), f"{notebook.name}, code cell {number}", "exec"), namespace)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_outputs_are_those_of_one_run(notebook):
    cells = code_cells(notebook)
    assert cells and [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and not [output for output in outputs if output["output_type"] == "error"]


def test_there_are_notebooks():
    assert NOTEBOOKS
