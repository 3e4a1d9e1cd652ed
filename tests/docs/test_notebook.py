"""docs/steermoe.ipynb: its committed outputs, the names that it uses, and all of it run again."""

import ast
import json
import re

import pytest

import steermoe
from steermoe.models.default import pull
from tests.support.pages import ROOT, read_page

FILE = "docs/steermoe.ipynb"
CELLS = json.loads(read_page(FILE))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
MOST_BYTES = 200_000


def source(cell):
    return "".join(cell["source"])


def test_it_was_run_and_is_small():
    assert len(CODE) == 10
    assert [cell["execution_count"] for cell in CODE] == list(range(1, 11))
    assert all(cell["outputs"] for cell in CODE)
    kinds = {output["output_type"] for cell in CODE for output in cell["outputs"]}
    assert kinds == {"stream", "display_data"}
    assert all(output.get("name") != "stderr" for cell in CODE for output in cell["outputs"])
    assert (ROOT / FILE).stat().st_size < MOST_BYTES


def test_it_uses_only_public_names():
    nodes = [node for cell in CODE for node in ast.walk(ast.parse(source(cell)))]
    names = {
        node.attr for node in nodes if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "steermoe"
    }
    assert len(names) > 10
    assert names <= set(steermoe.__all__)
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if name.startswith("steermoe")} == {"steermoe"}


def test_its_links_lead_somewhere():
    links = [link for cell in CELLS for link in re.findall(r"\]\(([^)#]+)\)", source(cell))]
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).is_file()] == []


@pytest.mark.slow
@pytest.mark.default_model
def test_it_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: make install")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: make install")
    import nbformat

    if not pull.is_pulled():
        pytest.skip("the default model is not pulled: `make model`")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / FILE, as_version=4)
    for cell in notebook.cells:
        cell.outputs = []
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()  # raises what a cell raises
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in ran)
    printed = "".join(output.get("text", "") for cell in ran for output in cell.outputs)
    assert "smollm2-moe: 30 layers, 2 of 18 experts per token" in printed
    assert "SteeringReport(" in printed
