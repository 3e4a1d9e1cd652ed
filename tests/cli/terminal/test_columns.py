"""Columns of a comparison."""

import io

import pytest
from rich.console import Console

from steermoe.cli.terminal.columns import print_columns
from steermoe.engines.request import Completion, Request
from steermoe.evaluation.comparison import Column


@pytest.mark.parametrize(("words", "expected"), [(0, "0 words"), (1, "1 word"), (2, "2 words")])
def test_one_word_is_no_plural(words, expected):
    completion = Completion(Request("Once"), "a goal", (1, 2), 1, "stop", 0.1)
    console = Console(file=io.StringIO(), width=60)
    print_columns("Once", [Column(completion, "sport", "", {"sport": 0.5}, (), {"sport": words})], console)
    assert f"50%, {expected} " in console.file.getvalue()
