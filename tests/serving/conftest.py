"""One server on a tiny checkpoint for all tests of a module of clients."""

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'steermoe[serve]'")

from tests.support import served


@pytest.fixture(scope="session")
def vectors(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("served") / "vectors"
    served.write_vectors(folder, tiny_model.shape)
    return folder


@pytest.fixture(scope="session")
def engine(tiny_checkpoint):
    """The engine of the shared server: run nothing on it."""
    return served.tiny_engine(tiny_checkpoint)


@pytest.fixture(scope="session")
def reference(tiny_checkpoint):
    """The same model once more, for what a request gives alone."""
    return served.tiny_engine(tiny_checkpoint)


@pytest.fixture(scope="session")
def server(engine, vectors):
    with served.running(engine, vectors) as running:
        yield running
