"""Whose a vector is: fingerprints decide, then names; what belongs to another model is taken only on request."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from steermoe.errors import CompatibilityError
from steermoe.models.description import describe
from steermoe.routing.shape import RouterShape, RoutingShape
from steermoe.steering.resolver import PlanResolver
from steermoe.steering.spec import SteeringSpec
from steermoe.vectors import library
from steermoe.vectors.file import read_header, write_vector
from steermoe.vectors.library import fitting, load_vector, read_fitting, vectors_for, whose
from steermoe.vectors.mixing import mix
from steermoe.vectors.vector import VectorInfo


@pytest.fixture(scope="module")
def models(tiny_checkpoint, tmp_path_factory):
    """Shapes of checkpoints on disk: a base model, a fine-tune, a renamed copy, a re-trained one, pruned ones."""
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("checkpoints")

    def write(name, seed=None, **sizes):
        shutil.copytree(tiny_checkpoint, folder / name)
        if seed is not None:
            torch.manual_seed(seed)
            config = MixtralConfig.from_pretrained(tiny_checkpoint, **sizes)
            MixtralForCausalLM(config).save_pretrained(folder / name)
        return describe(folder / name).shape

    return SimpleNamespace(
        base=write("sparse-8b"),
        instruct=write("sparse-8b-instruct", seed=1),
        renamed=write("my-model"),
        retrained=write("again/sparse-8b", seed=2),
        pruned=write("sparse-8b-pruned", seed=3, num_local_experts=6),
        shallow=write("sparse-8b-shallow", seed=4, num_hidden_layers=2),
    )


@pytest.fixture
def place(bare_search_path, make_vector, models, monkeypatch):
    """Writes a vector for a model into the folder of vectors, at a place that says when it is found."""
    monkeypatch.setattr(library, "_strangers", set())

    def write(order, shape, domain="sport", **changes):
        info = replace(VectorInfo.of(shape), title=order, **changes)
        vector = make_vector(domain, shape.layers, shape.num_experts, info=info)
        path = bare_search_path / "steering_vectors" / order / f"{domain}.safetensors"
        write_vector(vector, path)
        return path

    return write


def test_checkpoints_have_their_own_fingerprints(models):
    prints = [shape.fingerprint for shape in vars(models).values()]
    assert "" not in prints
    assert models.renamed.fingerprint == models.base.fingerprint
    assert len(set(prints)) == len(prints) - 1


@pytest.mark.parametrize("order", ["abc", "bca", "cab"])
def test_the_model_s_own_comes_first_wherever_it_lies(place, models, caplog, order):
    place(order[0], models.instruct)
    place(order[1], models.retrained)
    place(order[2], models.base)
    for shape in (models.base, models.renamed):  # whatever it is called
        assert load_vector("sport", shape).info.title == order[2]
        assert vectors_for(shape)["sport"].info.title == order[2]
        assert PlanResolver(shape).plan(SteeringSpec(("sport",))).vector.info.title == order[2]
    assert load_vector("sport", models.instruct).info.title == order[0]
    assert caplog.messages == []


def test_other_weights_of_the_name_are_taken_with_one_warning(place, models, caplog):
    place("a", models.retrained)
    for _ in range(2):
        assert load_vector("sport", models.base).info.title == "a"
        assert vectors_for(models.base)["sport"].info.title == "a"
    (message,) = caplog.messages
    assert "vector 'sport' was built for a model of the same name whose routers are others" in message
    assert models.retrained.fingerprint in message
    assert models.base.fingerprint in message


def test_names_decide_where_a_fingerprint_is_unknown(place, models, caplog):
    place("a", models.instruct, fingerprint="")
    place("b", models.base, fingerprint="")
    assert load_vector("sport", models.base).info.title == "b"
    place("0", models.base)
    place("9", models.instruct)
    unknown = replace(models.base, fingerprint="")
    assert load_vector("sport", unknown).info.title == "0"
    assert caplog.messages == []


def test_another_model_s_is_taken_only_on_request(place, models, caplog):
    path = place("a", models.instruct)
    resolver = PlanResolver(models.base)
    for use in (
        lambda: load_vector("sport", models.base),
        lambda: vectors_for(models.base, ["sport"]),
        lambda: resolver.plan(SteeringSpec(("sport",))),
    ):
        with pytest.raises(CompatibilityError, match=r"'sport' was built for sparse-8b-instruct, .* with --any-model"):
            use()
    assert resolver.domains() == []
    assert caplog.messages == []

    asked = PlanResolver(models.base, any_model=True)
    assert asked.domains() == ["sport"]
    assert asked.plan(SteeringSpec(("sport",))).vector.info.title == "a"
    assert load_vector("sport", models.base, any_model=True).info.title == "a"
    assert vectors_for(models.base, any_model=True)["sport"].info.title == "a"
    (message,) = caplog.messages
    assert message.startswith("vector 'sport' was built for another model, 'sparse-8b-instruct': it may steer")

    assert load_vector(path, models.base).info.title == "a"  # a path asks for it too
    assert len(caplog.messages) == 1
    place("b", models.base)
    assert load_vector("sport", models.base, any_model=True).info.title == "b"


@pytest.mark.parametrize("sibling", ["pruned", "shallow"])
def test_a_pruned_sibling_s_is_refused(place, models, sibling):
    path = place("a", getattr(models, sibling))
    for name, any_model in (("sport", False), ("sport", True), (path, True)):
        with pytest.raises(CompatibilityError, match=f"'sport' has .* built for sparse-8b-{sibling}"):
            load_vector(name, models.base, any_model=any_model)


@pytest.mark.parametrize(
    ("columns", "model", "fingerprint", "state"),
    [
        (6, "tiny", "", "named"),  # columns without an expert may be left out, as in a matrix that was imported
        (6, "tiny", "1" * 16, "own"),
        (6, "tiny", "2" * 16, None),
        (6, "pruned", "2" * 16, None),
        (6, "pruned", "", None),
        (8, "tiny", "2" * 16, "changed"),
        (8, "other", "2" * 16, "foreign"),
    ],
)
def test_a_quarter_fewer_experts(make_vector, columns, model, fingerprint, state):
    """Eight columns, of which two have no expert: a vector of six may be the model's, or a pruned sibling's."""
    shape = RoutingShape("tiny", (), tuple(RouterShape(n, 8, 8, 2, 2) for n in range(3)), fingerprint="1" * 16)
    vector = make_vector(experts=columns, info=VectorInfo(model=model, fingerprint=fingerprint))
    if state is None:
        with pytest.raises(CompatibilityError, match="'sport' has 3x6 experts, tiny has 3x8"):
            whose(vector, shape)
    else:
        assert whose(vector, shape) == state


def test_damage_is_not_skipped(place, models):
    path = place("a", models.base)
    place("b", models.base)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(library.VectorError, match="cut off"):
        load_vector("sport", models.base)
    found = fitting([path, place("b", models.base)], models.base)
    assert [(each.whose, each.is_taken, each.header is None) for each in found] == [
        ("named", True, True),
        ("own", False, False),
    ]


def test_the_header_keeps_it_under_its_hash(place, models):
    path = place("a", models.base)
    assert read_header(path).info.fingerprint == models.base.fingerprint
    assert read_header(path).as_dict()["fingerprint"] == models.base.fingerprint
    other = models.base.fingerprint[::-1].encode()
    path.write_bytes(path.read_bytes().replace(models.base.fingerprint.encode(), other))
    with pytest.raises(library.VectorError, match="does not match the hash"):
        read_fitting([path], models.base)


def test_a_mixture_has_it_if_all_parts_do(make_vector):
    one, other = (make_vector(info=VectorInfo(fingerprint=name * 16)) for name in "ab")
    assert mix([(one, 0.5), (one, 0.5)]).info.fingerprint == "a" * 16
    assert mix([(one, 0.5), (other, 0.5)]).info.fingerprint == ""


# ---- commands ----


@pytest.fixture
def checkpoint(tiny_checkpoint):
    return describe(tiny_checkpoint).shape


def test_generate(run, place, models, tiny_checkpoint, checkpoint):
    path = place("a", models.instruct)
    command = ("generate", "A dog", "-d", "sport", "-m", tiny_checkpoint, "--max-new-tokens", "3", "--json")
    code, out, err = run(*command, "--no-build")
    assert (code, out) == (1, "")
    assert "'sport' was built for sparse-8b-instruct" in err
    assert "--any-model" in err
    code, out, err = run(*command, "--any-model")
    assert code == 0
    assert "steermoe: vector 'sport' was built for another model, 'sparse-8b-instruct'" in err
    assert run(*command[:3], path, *command[4:]).code == 0


def test_list_says_which_one_is_taken(run, place, models, tiny_checkpoint, checkpoint):
    place("a", models.instruct)
    place("b", models.pruned)
    place("c", replace(models.instruct, name="tiny-mixtral"))
    place("d", checkpoint)
    records = json.loads(run("vectors", "list", "-m", tiny_checkpoint, "--json").out)
    assert [(record["title"], record["whose"], record["taken"]) for record in records] == [
        ("a", "foreign", False),
        ("b", None, False),
        ("c", "changed", False),
        ("d", "own", True),
    ]
    assert records[3]["fingerprint"] == checkpoint.fingerprint
    lines = run("vectors", "list", "-m", tiny_checkpoint).out.splitlines()
    assert [line.split("safetensors  ")[-1] for line in lines[1:]] == [
        "another model's",
        "does not fit",
        "of its name, other weights",
        "its own, taken",
    ]
    assert checkpoint.fingerprint[:8] in run("vectors", "list").out
    assert "whose" not in json.loads(run("vectors", "list", "--json").out)[0]


def test_check_adds_a_fingerprint_that_is_missing(run, place, models, tiny_checkpoint, checkpoint):
    path = place("a", checkpoint, fingerprint="")
    before = read_header(path)
    assert run("vectors", "check", "sport", "--rehash").code == 0
    assert read_header(path) == before
    assert run("vectors", "check", "sport", "--rehash", "-m", tiny_checkpoint).code == 0
    after = read_header(path)
    assert after.info == replace(before.info, fingerprint=checkpoint.fingerprint)
    assert after.tensors_sha256 == before.tensors_sha256
    other = place("b", models.instruct, "food", fingerprint="")
    assert run("vectors", "check", other, "--rehash", "-m", tiny_checkpoint).code == 0
    assert read_header(other).info.fingerprint == ""
    assert run("vectors", "check", "food", "-m", tiny_checkpoint).code == 1
    assert run("vectors", "check", "food", "-m", tiny_checkpoint, "--any-model").code == 0


def test_calibrating_does_not_change_another_model_s_file(run, place, models, tiny_checkpoint):
    path = place("a", models.instruct)
    before = path.read_bytes()
    code, out, err = run("calibrate", "-d", "sport", "--any-model", "-m", tiny_checkpoint)
    assert (code, out) == (1, "")
    assert "was built for sparse-8b-instruct, whose strength it holds: pass --output FOLDER" in err
    assert path.read_bytes() == before
