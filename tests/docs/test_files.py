"""The examples of docs/files.md, run as written on the default model."""

import re
from functools import partial

import pytest

from steermoe.models.default import pull
from steermoe.vectors.exporting import EXPORT_FORMATS
from steermoe.vectors.importing import IMPORT_FORMATS
from tests.support.pages import code_blocks, read_page, run_console

PAGE = read_page("docs/files.md")

blocks = partial(code_blocks, PAGE)


def test_every_format_is_in_the_page():
    assert re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE) == list(IMPORT_FORMATS)
    assert set(re.findall(r"--format (\w+)", "".join(blocks("console")))) == set(EXPORT_FORMATS)


@pytest.mark.slow
@pytest.mark.default_model
@pytest.mark.parametrize("block", blocks("console"))
def test_block_runs(block, tmp_path):
    if not pull.is_pulled():
        pytest.skip("the default model is not pulled: `make model`")
    assert len(run_console(block, tmp_path).strip()) > 10


def test_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("python")
    exec(compile(block, "files.md", "exec"), {})
    assert capsys.readouterr().out == "{0: {1: 0.5}, 1: {0: 1.0}}\n"
