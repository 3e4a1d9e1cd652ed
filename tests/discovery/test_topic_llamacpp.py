"""In llama.cpp too a model writes about a topic, and the routing of its own tokens alone counts."""

import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llamacpp")
pytest.importorskip("numba", reason="numba is not installed: make llamacpp")

from steermoe.discovery.topic import build_topics
from steermoe.discovery.writing import Writing, _request, asks_about, style_of, write
from steermoe.engines.llamacpp.engine import LlamaCppEngine
from tests.support import tiny_ggufs

SHORT = Writing(texts=4, new_tokens=12)


def test_a_gguf_file_writes_about_a_topic(tmp_path, monkeypatch):
    monkeypatch.setenv("STEERMOE_CACHE", str(tmp_path / "cache"))
    engine = LlamaCppEngine(str(tiny_ggufs.write(tiny_ggufs.build("qwen3_moe"), tmp_path)), cache="f32")
    assert style_of(engine) == "openings"
    asks = asks_about("pirates at sea", SHORT, "openings", "en")
    for ask, one in zip(asks, write(engine, asks, SHORT), strict=True):
        (completion,) = engine.generate([_request(engine, ask, SHORT)])
        prompt = engine.encode(completion.request)
        chosen = engine.chosen([*prompt, *completion.token_ids[:-1]])[len(prompt) :].sum(0)
        assert completion.text.strip() == one.text
        counts = one.frequency.numpy() * chosen.sum(-1, keepdims=True)
        np.testing.assert_allclose(counts, counts.round(), atol=1e-4)  # whole numbers: of these tokens, not of others
        assert np.abs(counts - chosen).max() < 1.5  # read together or one by one, a close choice may differ
    (made,) = build_topics(engine, {"pirates": "pirates at sea"}, SHORT)
    made.vector.check_fits(engine.shape)
    assert made.vector.experts.any()
