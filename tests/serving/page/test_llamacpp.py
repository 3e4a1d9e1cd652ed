"""Two texts side by side in llama.cpp, whose steering changes as they come."""

import time

import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llamacpp")

from steermoe.engines.llamacpp.engine import LlamaCppEngine
from steermoe.serving.live import Limits, LiveEngine
from steermoe.serving.page.session import Session
from steermoe.serving.page.settings import Settings
from steermoe.steering.resolver import PlanResolver
from tests.support import served, tiny_ggufs


def test_a_slider_changes_the_running_text(tmp_path):
    engine = LlamaCppEngine(tiny_ggufs.write(tiny_ggufs.build("mixtral"), tmp_path))
    served.write_vectors(tmp_path / "vectors", engine.shape)
    with LiveEngine(engine, Limits(rows=2)) as live:
        session = Session(live, PlanResolver(engine.shape, tmp_path / "vectors", watch=True, names_only=True))
        settings = Settings("Milo", amounts={"sport": 1.0}, tokens=min(900, live.tokens - 20), temperature=0.0)
        run = session.start(settings)
        deadline = time.monotonic() + 30
        while len(run.texts[1].seen) < 6:
            assert time.monotonic() < deadline
        session.steer(Settings("Milo", amounts={"food": 0.5}, tokens=settings.tokens)).result(10)
        seen = len(run.texts[1].seen)
        while len(run.texts[1].seen) < seen + 6 and not run.is_done:
            assert time.monotonic() < deadline
        session.stop()
        unsteered, steered = (text.ticket.result(30) for text in run.texts)
    assert [domain.name for domain in run.domains] == ["sport", "food"]
    assert len(steered.trace) > 6
    assert not unsteered.trace.strength.any()
    assert steered.trace.strength[0] == 8.0
