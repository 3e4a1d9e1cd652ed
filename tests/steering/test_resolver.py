"""From specs to plans: vectors are found, mixed and checked; what is kept, and what a server must not reveal."""

import os
import time
from pathlib import Path

import pytest
import torch

from steermoe.errors import CompatibilityError, SteeringError, SteerMoEError, VectorError, VectorNotFound
from steermoe.routing.routers import shape_of
from steermoe.routing.shape import RouterShape, RoutingShape
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.resolver import PlanResolver, check_spec
from steermoe.steering.spec import SteeringSpec
from steermoe.vectors.file import write_vector
from steermoe.vectors.vector import SteeringVector
from tests.support import steering_models as tiny


@pytest.fixture(scope="module")
def model():
    return tiny.build("mixtral")


@pytest.fixture
def vectors(model, bare_search_path) -> Path:
    folder = bare_search_path / "vectors"
    for domain, expert in (("sport", 1), ("food", 2)):
        write_vector(tiny.vector_for(model, expert, domain=domain), folder / f"{domain}.safetensors")
    return folder


@pytest.fixture
def resolver(model, vectors):
    return PlanResolver(shape_of(model), vectors)


MIXTURES = [("sport=0.7", "food=0.3"), ("sport=0.7+food=0.3",)]


@pytest.mark.parametrize("domain", MIXTURES)
def test_domains_are_mixed(resolver, domain):
    plan = resolver.plan(SteeringSpec(domain, 2.0, layers="0-1", ban=("1:7",), positions="all"))
    assert plan.vector.domain == "sport+food"
    frequency = 0.9 + 0.1 / tiny.EXPERTS
    for expert, weight in ((1, 0.7), (2, 0.3)):
        torch.testing.assert_close(plan.vector.experts[:, expert], torch.full((tiny.LAYERS,), weight * frequency))
    assert (plan.strength, plan.layers, plan.ban, plan.positions) == (2.0, (0, 1), ((1, 7),), "all")
    assert (plan.formula, plan.scale) == ("zero_max_scaled", "magnitude")


def test_nothing_asked_for_is_no_plan(resolver):
    assert resolver.plan(SteeringSpec(strength=3.0, layers="0-1")) is None
    assert resolver.plan(SteeringSpec("none")) is None
    assert resolver.plan(SteeringSpec(force=("0:1",))).force == ((0, 1),)


def test_equal_specs_share_a_plan_and_equal_mixtures_a_vector(resolver):
    plan = resolver.plan(SteeringSpec("sport+food"))
    assert resolver.plan(SteeringSpec(["sport+food"])) is plan
    assert resolver.plan(SteeringSpec("sport+food", 3.0)).vector is plan.vector


@pytest.mark.parametrize(
    ("spec", "error", "match"),
    [
        (SteeringSpec("knitting"), VectorNotFound, "'knitting'"),
        (SteeringSpec("sport=0"), VectorError, "sport=0"),
        (SteeringSpec("sport=1e300"), SteeringError, "'sport=1e300': the weight 1e\\+300 is out of range"),
        (SteeringSpec("sport", strength=1e39), SteeringError, "strength 1e\\+39 for 'sport' is out of range"),
        (SteeringSpec("sport=1e6", strength=2.0), SteeringError, "times the largest weight of 'sport'"),
        (SteeringSpec("huge=1000+huge"), SteeringError, "'huge=1000\\+huge': the weights times"),
        (SteeringSpec(formula="nosuch"), SteeringError, "formula 'nosuch' is unknown"),
        (SteeringSpec("none", strength=float("inf")), SteeringError, "strength inf is out of range"),
        (SteeringSpec(scale="nosuch", layers="3-1"), SteeringError, "scale 'nosuch' is unknown"),
        (SteeringSpec("a" * 5000), VectorNotFound, "at most 4096 characters"),
        (SteeringSpec("a\nb\x1b"), VectorError, "'a\\\\nb\\\\x1b' is not allowed"),
        (SteeringSpec("tall"), CompatibilityError, "tall"),
        (SteeringSpec("sport", layers="7-9"), SteeringError, "layers 7-9 hold no router"),
        (SteeringSpec("sport", schedule="decay:0"), SteeringError, "'decay:0'"),
        (SteeringSpec(schedule="decay:0"), SteeringError, "'decay:0'"),
        (SteeringSpec(force=("0:99",)), SteeringError, "does not exist"),
        (SteeringSpec(force=("0:1",), ban=("0:1",)), SteeringError, "both forced and banned"),
    ],
)
def test_errors(resolver, vectors, spec, error, match):
    frequency = torch.full((4, tiny.EXPERTS), 1 / tiny.EXPERTS)
    write_vector(SteeringVector("tall", frequency, (0, 1, 2, 3)), vectors / "tall.safetensors")
    huge = torch.full((tiny.LAYERS, tiny.EXPERTS), 1e38)
    write_vector(SteeringVector("huge", None, tuple(range(tiny.LAYERS)), weights=huge), vectors / "huge.safetensors")
    with pytest.raises(error, match=match):
        resolver.plan(spec)


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (SteeringSpec("sport", schedule="later"), "schedule 'later' is unknown"),
        (SteeringSpec("sport", strength=1e39), "strength 1e\\+39 is out of range"),
        (SteeringSpec("sport=1e300"), "the weight 1e\\+300"),
        (SteeringSpec("sport", layers="3-1"), "layers 3-1 is not a range"),
        (SteeringSpec(formula="nosuch"), "formula 'nosuch'"),
        (SteeringSpec("sport+knitting"), "no vector 'knitting'"),
        (SteeringSpec(force=("0:1",), ban=("0:1",)), "both forced and banned"),
    ],
)
def test_what_is_wrong_for_any_model_is_found_without_one(vectors, spec, match):
    with pytest.raises(SteerMoEError, match=match):
        check_spec(spec, vectors)


def test_what_may_be_right_for_some_model_passes(vectors):
    for spec in (SteeringSpec(), SteeringSpec("none"), SteeringSpec("sport=0.5+food", layers="900", ban=("900:900",))):
        check_spec(spec, vectors)


def test_a_file_that_cannot_be_read_is_left_out_with_one_line_in_the_log(model, vectors, caplog):
    resolver = PlanResolver(shape_of(model), vectors, watch=True, names_only=True)
    (vectors / "bad.safetensors").write_bytes(b"\x1b[31mnonsense")
    with caplog.at_level("WARNING"):
        assert [resolver.domains() for _ in range(3)] == [["food", "sport"]] * 3
        with pytest.raises(VectorNotFound, match="there are food, sport"):
            resolver.plan(SteeringSpec("knitting"))
    assert [str(vectors) in record.getMessage() for record in caplog.records] == [True]
    assert caplog.records[0].getMessage().isprintable()
    with pytest.raises(VectorError) as caught:
        resolver.plan(SteeringSpec("bad"))
    assert str(caught.value) == "the file of vector 'bad' can't be read: the server's log says why"
    write_vector(tiny.vector_for(model, 3, domain="bad"), vectors / "bad.safetensors")
    assert resolver.domains() == ["bad", "food", "sport"]


def test_long_lists_are_checked_in_little_time(vectors):
    shape = RoutingShape("large", (), tuple(RouterShape(layer, 256, 256, 8) for layer in range(60)))
    banned = tuple(f"{layer}:{expert}" for layer in range(60) for expert in range(240))
    started = time.perf_counter()
    assert len(PlanResolver(shape, vectors).plan(SteeringSpec(ban=banned)).ban) == 14400
    assert time.perf_counter() - started < 5


def test_packed_plans_are_checked_too(resolver, model):
    resolver.check(SteeringPlan(tiny.vector_for(model, 3), 0.0))
    with pytest.raises(SteeringError, match="hold no router"):
        resolver.check(SteeringPlan(tiny.vector_for(model, 3), 0.0, layers=(7, 9)))


def test_a_path_may_hold_a_plus(resolver, model, bare_search_path):
    write_vector(tiny.vector_for(model, 3, domain="law"), bare_search_path / "my+own.safetensors")
    for text in ("my+own.safetensors", "my+own.safetensors=0.5"):
        assert resolver.plan(SteeringSpec(text)).vector.domain == "law"
    assert resolver.plan(SteeringSpec(["my+own.safetensors=0.5", "sport"])).vector.domain == "law+sport"
    write_vector(tiny.vector_for(model, 3, domain="law"), bare_search_path / "own.safetensors")
    assert resolver.plan(SteeringSpec("sport+./own.safetensors")).vector.domain == "sport+law"


def test_what_was_read_once_stays_unless_files_are_watched(model, vectors):
    once, watched = PlanResolver(shape_of(model), vectors), PlanResolver(shape_of(model), vectors, watch=True)
    spec = SteeringSpec("sport")
    before = once.plan(spec), watched.plan(spec)
    assert watched.plan(spec) is before[1]
    write_vector(tiny.vector_for(model, 5), vectors / "sport.safetensors")
    os.utime(vectors / "sport.safetensors", ns=(1, 1))
    assert once.plan(spec) is before[0]
    assert watched.plan(spec).vector.experts[0, 5] > 0
    with pytest.raises(VectorNotFound):
        watched.plan(SteeringSpec("law"))
    write_vector(tiny.vector_for(model, 4, domain="law"), vectors / "law.safetensors")
    assert watched.plan(SteeringSpec("law")) is not None
    assert watched.domains() == ["food", "law", "sport"]


@pytest.mark.parametrize("watch", [False, True])
def test_strangers_name_domains_only_and_learn_no_folders(model, vectors, watch):
    resolver = PlanResolver(shape_of(model), vectors, watch=watch, names_only=True)
    assert resolver.plan(SteeringSpec("sport+food")).vector.domain == "sport+food"
    for text in (str(vectors / "sport.safetensors"), "../vectors/sport", f"food+{vectors / 'sport.safetensors'}"):
        with pytest.raises(VectorError, match="not allowed"):
            resolver.plan(SteeringSpec(text))
    with pytest.raises(VectorNotFound) as caught:
        resolver.plan(SteeringSpec("knitting"))
    assert str(caught.value) == "no vector 'knitting'; there are food, sport"


def test_a_file_that_is_no_vector_is_found_without_a_model(tmp_path):
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"garbage garbage")
    for path, match in ((garbage, "not a safetensors file"), (tmp_path / "none.safetensors", "no vector file")):
        for domain in (str(path), f"{path}=0.5"):
            with pytest.raises(VectorError, match=match):
                check_spec(SteeringSpec(domain=(domain,)))


def test_a_folder_that_is_not_there_is_refused_where_vectors_can_be_made(tmp_path):
    """Or a vector that is elsewhere is taken for a missing one, and built for minutes."""
    with pytest.raises(VectorNotFound, match=r"there is no folder of vectors '.*nowhere': name one, or leave it out"):
        check_spec(SteeringSpec(domain=("sport",)), tmp_path / "nowhere", lambda domain: True)
