"""The examples of docs/files.md, run as written on the default model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from steermoe.models.default import pull
from steermoe.vectors.exporting import EXPORT_FORMATS
from steermoe.vectors.importing import IMPORT_FORMATS

PAGE = (Path(__file__).parents[2] / "docs" / "files.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def test_every_format_is_in_the_page():
    assert re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE) == list(IMPORT_FORMATS)
    assert set(re.findall(r"--format (\w+)", "".join(blocks("console")))) == set(EXPORT_FORMATS)


@pytest.mark.slow
@pytest.mark.default_model
@pytest.mark.parametrize("block", blocks("console"))
def test_block_runs(block, tmp_path):
    if not pull.is_pulled():
        pytest.skip("the default model is not pulled: `make model`")
    script = f'steermoe() {{ "{sys.executable}" -m steermoe "$@"; }}\nset -e\n{block}'
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 10


def test_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("python")
    exec(compile(block, "files.md", "exec"), {})
    assert capsys.readouterr().out == "{0: {1: 0.5}, 1: {0: 1.0}}\n"
