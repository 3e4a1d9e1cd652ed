"""A tiny model that writes long texts, with vectors, a folder for new ones, and sessions on it."""

import shutil

import pytest
import torch

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'steermoe[play]'")

from steermoe.evaluation import provision
from steermoe.serving.live import LiveEngine
from steermoe.serving.page.session import Session
from steermoe.steering.resolver import PlanResolver
from steermoe.vectors import library
from tests.support import served

CONTEXT, LAYERS = 2048, 12


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder for everything that a visitor has built, and no vectors elsewhere."""
    import platformdirs

    folder = tmp_path_factory.mktemp("play")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("STEERMOE_VECTORS", raising=False)
        patch.setenv("STEERMOE_CACHE", str(folder / "cache"))
        patch.setattr(platformdirs, "user_data_path", lambda name: folder / "user-data" / name)
        patch.setattr(library, "packaged_vectors", lambda: folder / "packaged")
        patch.setattr(provision, "CALIBRATION_TEXTS", 2)
        yield folder


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint, tmp_path_factory):
    """A tiny model that takes seconds for a long text: more layers than the other one, and more room."""
    from transformers import AutoConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("long") / "tiny-long"
    shutil.copytree(tiny_checkpoint, folder)
    config = AutoConfig.from_pretrained(folder, num_hidden_layers=LAYERS, max_position_embeddings=CONTEXT)
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def engine(checkpoint):
    """What sessions and pages run on, one after another."""
    return served.tiny_engine(checkpoint)


@pytest.fixture(scope="module")
def vectors(home, engine):
    folder = home / "vectors"
    served.write_vectors(folder, engine.shape)
    return folder


@pytest.fixture
def session(engine, vectors):
    """A session of its own, whose engine is closed at the end."""
    with LiveEngine(engine) as live:
        yield Session(live, PlanResolver(engine.shape, vectors, watch=True, names_only=True))
