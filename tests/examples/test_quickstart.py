"""The notebook runs as it stands, and what it shows is what is in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

pytestmark = [
    pytest.mark.slow,
    # Of the libraries that start a kernel, about themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning", "ignore::ResourceWarning"),
]


def texts(cell: object) -> list[str]:
    """What a cell shows, where it is text."""
    outputs = cell["outputs"]  # type: ignore[index]  # a dictionary of nbformat
    return [output["text"] for output in outputs if output.get("name") == "stdout"]


def test_the_notebook_runs(repository: Path, tmp_path: Path) -> None:
    file = repository / "examples" / "quickstart.ipynb"
    written = nbformat.read(file, as_version=4)
    assert len(json.dumps(written)) < 100_000
    run = nbformat.read(file, as_version=4)
    nbclient.NotebookClient(run, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in run.cells if cell.cell_type == "code"]
    assert "nothing stands in its way" in texts(code[2])[0]
    assert "<table>" in code[3].outputs[0]["data"]["text/html"]
    assert "image/png" in code[4].outputs[0]["data"]
    assert "of these, wrong on purpose: [" in texts(code[5])[0]
    assert (tmp_path / "report.html").stat().st_size > 100_000
    shown = [cell for cell in written.cells if cell.cell_type == "code"]
    for before, now in zip(shown, code, strict=True):
        kinds = [output.output_type for output in before.outputs]
        assert kinds == [output.output_type for output in now.outputs if output.get("name") != "stderr"]
