"""Vectors for the commands that generate."""

import pytest

from steermoe.vectors.file import write_vector


@pytest.fixture
def vectors(bare_search_path, make_vector):
    """`sport` and `food` for the tiny model, in ./steering_vectors."""
    for domain in ("sport", "food"):
        write_vector(make_vector(domain), bare_search_path / "steering_vectors" / "tiny" / f"{domain}.safetensors")
    return bare_search_path
