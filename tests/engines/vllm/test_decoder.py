"""What the workers of a vLLM say, added up; without vLLM."""

from dataclasses import asdict

import pytest

from steermoe.engines.request import Request
from steermoe.engines.vllm.decoder import VLLMDecoder, report_of
from steermoe.errors import GenerationError
from steermoe.routing.shape import RouterShape, RoutingShape
from steermoe.steering.report import SteeringReport


class Workers:
    """Answers as `collective_rpc` does."""

    def __init__(self, *workers):
        self._workers = workers

    def collective_rpc(self, method):
        assert method == "steermoe_report"
        return [{**asdict(report), "rows": rows, "replica": replica} for report, rows, replica in self._workers]


FIRST, SECOND = SteeringReport(4, 10, 6, 5, 24), SteeringReport(2, 10, 6, 1, 12)
"""Two stages of a pipeline: the same tokens, routers of their own."""


def test_workers_that_share_layers_are_counted_once():
    assert report_of(Workers((FIRST, [0, 1], 0), (FIRST, [0, 1], 0))) == FIRST


def test_stages_see_the_same_tokens_and_add_up_their_choices():
    found = report_of(Workers((SECOND, [2], 0), (FIRST, [0, 1], 0), (SECOND, [2], 0), (FIRST, [0, 1], 0)))
    assert found == SteeringReport(6, 10, 6, 6, 36)
    assert found.vector_share == 6 / 36


def test_replicas_add_up_their_tokens():
    other = SteeringReport(3, 7, 2, 8, 12)
    assert report_of(Workers((FIRST, [0, 1], 0), (other, [0, 1], 1))) == FIRST + other


def test_a_trace_is_refused_before_anything_starts():
    shape = RoutingShape("m", (), (RouterShape(0, 8, 8, 2),))
    decoder = VLLMDecoder(Workers(), shape, None, {2})
    with pytest.raises(GenerationError, match="use --engine hf, or llamacpp"):
        decoder.start([Request("x"), Request("x", trace=True)], [[1], [1]])
    assert len(decoder) == 0
