"""`steermoe vectors mix`: where the mixture is written."""

from dataclasses import replace
from pathlib import Path

import pytest

from steermoe.vectors.file import write_vector
from steermoe.vectors.vector import VectorInfo


@pytest.mark.parametrize(
    ("model", "folder"),
    [("acme/base", "base"), ("", "mine"), ("..", "mine"), ("acme/..", "mine"), ("a\0b", "mine"), ("a\x1b[31m", "mine")],
)
def test_the_model_that_a_file_names_decides_the_folder_but_leads_nowhere_else(
    run, bare_search_path, make_vector, model, folder
):
    for name in ("sport", "food"):
        vector = replace(make_vector(name), info=VectorInfo(model=model))
        write_vector(vector, bare_search_path / "steering_vectors" / "mine" / f"{name}.safetensors")
    result = run("vectors", "mix", "sport=0.7", "food=0.3", "--output", "both")
    path = Path("steering_vectors") / folder / "both.safetensors"
    assert (result.code, result.out) == (0, f"{path}\n")
    assert path.is_file()
