"""Reports that add up: parts of a batch, added, against a single run over the same tokens."""

import json
from dataclasses import asdict
from functools import reduce
from operator import add

import pytest

from steermoe.steering.handle import steer
from steermoe.steering.report import SteeringReport
from tests.support import steering_models as tiny


@pytest.fixture(scope="module")
def model():
    return tiny.build("mixtral")


def test_sums_are_exact():
    """Shares of 1/3 and 1/7 weigh what their slots weigh, to the last digit."""
    one, other = SteeringReport(2, 10, 6, 4, 12), SteeringReport(3, 5, 2, 1, 7)
    assert one + other == SteeringReport(5, 15, 8, 5, 19)
    assert (one + other).vector_share == 5 / 19
    assert sum([one, other], SteeringReport()) == reduce(add, [one, other]) == other + one


def test_nothing_added_changes_nothing():
    report = SteeringReport(2, 10, 6, 4, 12)
    assert SteeringReport() + report == report + SteeringReport() == report
    assert sum([], SteeringReport()) == SteeringReport(0, 0, 0, 0, 0)


def test_without_slots_the_share_is_0():
    assert SteeringReport(tokens_seen=4).vector_share == 0.0


def test_users_read_the_share_and_processes_pass_the_counts():
    report = SteeringReport(2, 10, 6, 3, 12)
    assert report.as_dict() == {"router_calls": 2, "tokens_seen": 10, "tokens_steered": 6, "vector_share": 0.25}
    assert str(report) == "SteeringReport(router_calls=2, tokens_seen=10, tokens_steered=6, vector_share=0.25)"
    assert SteeringReport(**json.loads(json.dumps(asdict(report)))) == report


def test_lists_are_told_where_there_are_any():
    report = SteeringReport(2, 10, 6, 3, 12, forced_hits=5, forced_places=6, banned_hits=1, banned_places=4)
    shares = {name: share for name, share in report.as_dict().items() if name not in SteeringReport().as_dict()}
    assert shares == {"forced_share": pytest.approx(5 / 6), "banned_share": 0.25}
    assert SteeringReport().as_dict().keys() & shares.keys() == set()
    assert (SteeringReport().forced_share, SteeringReport().banned_share) == (1.0, 0.0)
    assert (report + report).banned_places == 8
    assert SteeringReport(**json.loads(json.dumps(asdict(report)))) == report


def report_of(model, plans, ids):
    with steer(model, rows=plans) as handle:
        tiny.continued(model, ids, 5)
    return handle.report()


@pytest.mark.parametrize("positions", ["generated", "all"])
def test_parts_of_a_batch_add_up_to_the_whole(model, positions):
    """Rows of several plans, one unsteered, cut into parts of different sizes."""
    plans = [
        tiny.plan_for_experts(model, 1, strength=1.2, positions=positions),
        None,
        tiny.plan_for_experts(model, 6, 2, strength=1.2, schedule="window:1-9", positions=positions),
        tiny.plan_for_experts(model, 3, strength=-0.7, schedule="decay:3", positions=positions),
    ]
    ids = tiny.prompt(4, rows=len(plans))
    whole = report_of(model, plans, ids)
    parts = [report_of(model, plans[cut], ids[cut]) for cut in (slice(0, 3), slice(3, 4))]
    found = sum(parts, SteeringReport())
    assert 0 < whole.vector_share < 1
    assert parts[0].vector_share != parts[1].vector_share
    assert (found.tokens_seen, found.tokens_steered) == (whole.tokens_seen, whole.tokens_steered)
    assert (found.hits, found.slots) == (whole.hits, whole.slots)
    assert found.vector_share == whole.vector_share
    assert found.router_calls == sum(part.router_calls for part in parts) > whole.router_calls  # a call serves all rows
