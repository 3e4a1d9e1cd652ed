"""`steermoe vectors import` of other tools' files, and `vectors export`: paths on stdout, errors in one line."""

import json
from pathlib import Path

import pytest
import torch

from steermoe.vectors.file import read_vector, write_vector
from steermoe.vectors.vector import SteeringVector, VectorInfo
from tests.support import other_tools


def one_line(text: str) -> str:
    assert len(text.strip().splitlines()) == 1, text
    return text.strip()


@pytest.fixture
def tiny(bare_search_path) -> Path:
    """A vector of 3 layers x 8 experts for the tiny checkpoint, with more experts in layer 0 than a token gets."""
    weights = torch.zeros(3, 8)
    weights[0, :3] = torch.tensor([0.5, 0.25, 0.75])
    weights[2, 7] = -1.0
    info = VectorInfo(model="tiny-mixtral", architecture="mixtral", top_k=2)
    path = bare_search_path / "steering_vectors" / "tiny-mixtral" / "chess.safetensors"
    write_vector(SteeringVector("chess", None, (0, 1, 2), weights=weights, info=info), path)
    return path


def test_import_for_a_model_with_its_rule(run, bare_search_path, tiny_checkpoint):
    Path("faithful.json").write_bytes(other_tools.easysteer())
    code, out, err = run("vectors", "import", "faithful.json", "-d", "faithful", "-m", tiny_checkpoint, "--json")
    record = json.loads(out)
    assert (code, err) == (0, "")
    assert (record["formula"], record["strength"]) == ("zero_max_scaled", 1.01)
    assert record["created_by"] == "steermoe vectors import (easysteer)"
    assert read_vector(Path(record["path"])).chosen() == {0: {0: 1.0, 1: -1e4, 3: 1.0}, 1: {2: -1e4}, 2: {}}


def test_import_of_the_best_scores(run, bare_search_path, tiny_checkpoint):
    Path("scores.json").write_bytes(other_tools.dsmoe())
    code, out, err = run("vectors", "import", "scores.json", "-d", "law", "-m", tiny_checkpoint, "--top", "2")
    assert (code, err) == (0, "")
    assert read_vector(Path(out.strip())).chosen() == {0: {0: 1.0}, 1: {1: 1.0}, 2: {}}


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 1, "does not say how many experts a layer has: pass --model"),
        (["--format", "steermoe"], 1, "is a damaged pickle"),
        (["--format", "nope"], 2, "'nope' is not one of"),
        (["--top", "0"], 2, "'--top': Input should be greater than or equal to 1; it is '0'"),
        (["--top", "5"], 1, "has 4 experts with a score above 0, --top asks for 5"),
    ],
)
def test_import_refuses_a_file_of_another_tool(run, bare_search_path, options, code, message):
    Path("scores.json").write_bytes(other_tools.dsmoe())
    found, out, err = run("vectors", "import", "scores.json", "-d", "law", *options)
    assert (found, out) == (code, "")
    assert message in (one_line(err) if code == 1 else " ".join(err.split()))


# ---- export ----


@pytest.mark.parametrize(("format", "name"), [("csv", "chess.csv"), ("gguf", "chess.gguf"), ("json", "chess.json")])
def test_what_is_exported_is_imported(run, tiny, format, name):
    code, out, err = run("vectors", "export", "chess", "--format", format)
    assert (code, out, err) == (0, f"{name}\n", "")
    code, out, err = run("vectors", "import", name, "-d", "again")
    assert (code, err) == (0, "")
    assert torch.equal(read_vector(Path(out.strip())).experts, read_vector(tiny).experts)


def test_export_says_what_it_leaves_out(run, tiny):
    code, out, err = run("vectors", "export", "chess", "--format", "easysteer", "-o", "easy.json", "--json")
    assert code == 0
    assert json.loads(out) == {"path": "easy.json", "format": "easysteer", "domain": "chess", "left_out": 1}
    assert "left out 1 expert: EasySteer activates at most 2 in a layer" in one_line(err)
    configs = json.loads(Path("easy.json").read_text())["layer_configs"]
    assert configs["0"] == {"mode": "activate", "expert_ids": [0, 2]}
    assert configs["2"] == {"mode": "deactivate", "expert_ids": [7]}


def test_export_refuses(run, tiny):
    assert run("vectors", "export", "chess").code == 0
    code, out, err = run("vectors", "export", "chess")
    assert (code, out) == (1, "")
    assert "'chess.json' already exists: pass --force to overwrite it, or --output" in one_line(err)
    assert run("vectors", "export", "chess", "--force").code == 0
    assert "can't write" in one_line(run("vectors", "export", "chess", "-o", "chess.json/x.json").err)
    assert "no vector 'none'" in one_line(run("vectors", "export", "none").err)


@pytest.mark.parametrize("command", ["import", "export"])
def test_help_ends_with_examples(run, command):
    code, out, _ = run("vectors", command, "--help")
    assert code == 0
    assert f"steermoe vectors {command} " in out.split("Examples:")[1]
