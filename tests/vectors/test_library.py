"""Vector files: the round trip, the search path, damaged files, atomic writes, and the authors' JSON."""

import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from steermoe.errors import CompatibilityError, VectorError, VectorNotFound
from steermoe.files import atomic_path
from steermoe.routing.shape import RoutingShape, name_of
from steermoe.steering.resolver import PlanResolver
from steermoe.steering.spec import SteeringSpec
from steermoe.vectors import file, library
from steermoe.vectors.file import read_header, read_vector, write_vector
from steermoe.vectors.library import find_vectors, first_file, load_vector, vectors_for
from steermoe.vectors.matrix import import_matrix
from steermoe.vectors.mixing import mix
from steermoe.vectors.vector import SteeringVector, VectorInfo

FULL_INFO = VectorInfo(
    title="Sports & games",
    keywords=("team", "Spiel", "игра"),
    model="tiny-mixtral",
    architecture="mixtral",
    top_k=2,
    formula="zero_max_scaled",
    scale="paper",
    strength=-1.5,
    safe_range=(-2.0, 0.5),
    damage=0.75,
    texts=3,
    tokens=400,
    corpus_sha256="ab" * 32,
    created_by="a test",
    licence="Apache-2.0",
    parts=("sport=0.7 sha256:0123456789ab", "food=-0.3"),
)


def write_raw(path: Path, tensors: dict[str, torch.Tensor] | None = None, **changes) -> Path:
    """A vector file with any content: what `changes` doesn't name is valid, including the hash; None drops a key."""
    tensors = {"frequency": torch.full((2, 4), 0.25)} if tensors is None else tensors
    header = {
        "format_version": file.FORMAT_VERSION,
        "domain": "sport",
        "layers": [0, 1],
        "num_experts": 4,
        "threshold": 3.0,
        "relative": False,
        "tensors_sha256": ""
        if any(t.dtype == torch.bfloat16 for t in tensors.values())
        else file.tensors_sha256(tensors),
        "info": {},
        **changes,
    }
    header = {key: value for key, value in header.items() if value is not None}
    if header.get("format_version") != 1:
        header.setdefault("sha256", file.header_sha256(header))
    text = json.dumps(header)
    save_file(tensors, path, {"steermoe": text})
    return path


# ---- the round trip ----


@pytest.mark.parametrize("threshold", [3.0, 0.5])
def test_round_trip_is_exact(tmp_path, make_vector, threshold):
    baseline = torch.full((3, 8), 1 / 8)
    vector = make_vector(threshold=threshold, baseline=baseline, relative=True, layers=(1, 4, 9), info=FULL_INFO)
    write_vector(vector, tmp_path / "new" / "folder" / "sport.safetensors")
    back = read_vector(tmp_path / "new" / "folder" / "sport.safetensors")
    assert torch.equal(back.frequency, vector.frequency)
    assert torch.equal(back.baseline, baseline)
    assert torch.equal(back.experts, vector.experts)
    assert back.weights is None
    assert (back.domain, back.layers, back.threshold, back.relative) == ("sport", (1, 4, 9), threshold, True)
    assert back.info == FULL_INFO


def test_round_trip_of_a_mixture(tmp_path):
    weights = torch.tensor([[0.5, -0.25], [0.0, 1.0]], dtype=torch.float64)
    write_vector(SteeringVector("sport+food", None, (0, 1), weights=weights), tmp_path / "mix.safetensors")
    back = read_vector(tmp_path / "mix.safetensors")
    assert back.domain == "sport+food"
    assert back.frequency is None
    assert torch.equal(back.weights, weights.float())


def test_header_matches_the_vector(tmp_path, make_vector):
    path = tmp_path / "sport.safetensors"
    write_vector(make_vector(info=FULL_INFO, layers=(1, 4, 9)), path)
    header = read_header(path)
    assert (header.domain, header.layers, header.num_experts, header.matrices) == (
        "sport",
        (1, 4, 9),
        8,
        ("frequency",),
    )
    assert header.info == FULL_INFO
    flat = header.as_dict()
    assert json.loads(json.dumps(flat))["keywords"] == ["team", "Spiel", "игра"]
    assert "info" not in flat


def test_same_vector_same_bytes(tmp_path, make_vector):
    for name in ("a", "b"):
        write_vector(make_vector(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_unknown_info_of_a_later_version_is_left_out(tmp_path):
    assert read_vector(write_raw(tmp_path / "x", info={"title": "Sport", "mood": "good"})).info == VectorInfo(
        title="Sport"
    )


# ---- damage ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 3}, "format version 3, this steermoe reads 1 to 2: upgrade"),
        ({"format_version": "2"}, "format version '2', this steermoe reads"),
        ({"format_version": 1, "sha256": "0" * 64}, "garbles a field .*sha256.*is unknown"),
        ({"sha256": "0" * 64}, "header .*does not match the hash in it"),
        ({"mood": "good"}, "garbles a field .*mood.*is unknown"),
        ({"format_version": None}, "header lacks or garbles a field .*format_version"),
        ({"tensors_sha256": "0" * 64}, "do not match the hash"),
        ({"tensors_sha256": None}, "lacks or garbles a field .*tensors_sha256"),
        ({"domain": "../sport"}, "domain name '../sport' is not allowed"),
        ({"domain": "food+../sport"}, "domain name '../sport' is not allowed"),
        ({"domain": 3}, "garbles a field .*domain is 3"),
        ({"layers": [0]}, r"shape \[2, 4\], expected 1 layers"),
        ({"layers": [0.0, 1.0]}, "garbles a field .*layers are"),
        ({"layers": "01"}, "garbles a field .*layers is '01'"),
        ({"layers": [0, 100_000_000]}, r"garbles a field .*layers are \[0, 100000000\], expected .* below 65536"),
        ({"layers": [-1, 0]}, "increasing, from 0 on"),
        ({"num_experts": 10**400}, r"num_experts is 1000.*\.\.\., expected 1 to 65536"),
        ({"num_experts": 0}, "num_experts is 0, expected"),
        ({"info": {"strength": 10**400}}, r"strength is 1000.*\.\.\., expected a finite number"),
        ({"info": {"damage": -(10**400)}}, "damage is -1000.*expected a finite number"),
        ({"info": {"safe_range": [0, 10**400]}}, "safe_range is .*expected two finite numbers"),
        ({"info": {"texts": 2**63}}, "texts is 9223372036854775808, expected a whole number"),
        ({"info": {"title": ["x"] * 1000}}, r"title is .*\.\.\., expected text"),
        ({"num_experts": 5}, "header says 5 experts per layer, it has 4"),
        ({"threshold": "3"}, "garbles a field .*threshold is '3'"),
        ({"threshold": float("nan")}, "threshold nan must be a finite number"),
        ({"relative": True}, "store the corpus baseline"),
        ({"info": []}, r"garbles a field .*info is \[\]"),
        ({"info": {"strength": "4"}}, "strength is '4', expected a finite number"),
        ({"info": {"strength": float("inf")}}, "strength is inf"),
        ({"info": {"keywords": "team"}}, "keywords is 'team', expected a tuple of texts"),
        ({"info": {"keywords": [1]}}, "keywords is"),
        ({"info": {"formula": "cubic"}}, "formula is 'cubic', expected additive"),
    ],
)
def test_damaged_headers(tmp_path, changes, message):
    path = write_raw(tmp_path / "sport.safetensors", **changes)
    with pytest.raises(VectorError, match=message) as error:
        read_vector(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"frequency": torch.tensor([[0.5, 0.5, float("nan"), 0.0]] * 2)}, "frequency contains NaN or infinity"),
        ({"frequency": torch.tensor([[1.5, -0.5, 0.0, 0.0]] * 2)}, "contains -0.5, but frequencies are never negative"),
        ({"frequency": torch.ones(2, 4)}, "row 0 of frequency sums to 4, expected 1"),
        ({"frequency": torch.full((2, 4), 0.25), "baseline": torch.ones(2, 4)}, "row 0 of baseline sums to 4"),
        ({"frequency": torch.full((2, 4), 0.25), "baseline": torch.full((2, 2), 0.5)}, "different shapes"),
        ({"frequency": torch.full((2, 4), 0.25, dtype=torch.float64)}, "frequency': 'F64'.*expected F32"),
        ({"frequency": torch.full((2, 4), 0.25, dtype=torch.bfloat16)}, "frequency': 'BF16'.*expected F32"),
        (
            {"frequency": torch.full((2, 4), 0.25), "extra": torch.ones(1)},
            "extra.*expected F32 matrices named frequency",
        ),
        ({"baseline": torch.full((2, 4), 0.25)}, "neither frequencies nor weights"),
        ({"weights": torch.full((2, 4), float("inf"))}, "weights contains NaN or infinity"),
    ],
)
def test_invalid_numbers(tmp_path, tensors, message):
    path = write_raw(tmp_path / "sport.safetensors", tensors)
    with pytest.raises(VectorError, match=message) as error:
        read_vector(path)
    assert str(path) in str(error.value)


@pytest.fixture
def good_file(tmp_path, make_vector) -> Path:
    path = tmp_path / "sport.safetensors"
    write_vector(make_vector(), path)
    return path


def header_only(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda good: good[:-1] + bytes([good[-1] ^ 1]), "do not match the hash"),
        (lambda good: good[:-8], "is not a safetensors file or is cut off"),
        (lambda good: good[:100], "is not a safetensors file or is cut off"),
        (lambda good: b"", "is not a safetensors file or is cut off"),
        (lambda good: b"not a vector at all", "is not a safetensors file or is cut off"),
        (lambda good: header_only(b"{}"), "no 'steermoe' entry"),
        (lambda good: header_only(b'{"__metadata__":{"steermoe":"{"}}'), "garbles a field .*JSONDecodeError"),
        (lambda good: header_only(b'{"__metadata__":{"steermoe":"7"}}'), "garbles a field"),
        (lambda good: header_only(b'{"__metadata__":{"steermoe":"' + b"[" * 100_000 + b'"}}'), "RecursionError"),
    ],
)
def test_damaged_files(good_file, damage, message):
    good_file.write_bytes(damage(good_file.read_bytes()))
    with pytest.raises(VectorError, match=message) as error:
        read_vector(good_file)
    assert str(good_file) in str(error.value)


@pytest.mark.parametrize("read", [read_vector, read_header])
def test_not_a_file(tmp_path, read):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(VectorNotFound, match=r"no vector file .*steermoe vectors list"):
            read(path)


def test_name_too_long_for_any_file(tmp_path, make_vector):
    path = tmp_path / f"{'x' * 300}.safetensors"
    with pytest.raises(VectorError, match="can't read"):
        read_vector(path)
    with pytest.raises(VectorError, match="can't write"):
        write_vector(make_vector(), path)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("pickle-was-run",)


@pytest.mark.parametrize(
    "save", [lambda path: torch.save(Payload(), path), lambda p: p.write_bytes(pickle.dumps(Payload()))]
)
def test_a_pickle_is_rejected_and_never_run(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "sport.safetensors")
    with pytest.raises(VectorError, match="is not a safetensors file"):
        load_vector(tmp_path / "sport.safetensors")
    assert not (tmp_path / "pickle-was-run").exists()


# ---- names and the search path ----


@pytest.mark.parametrize("name", ["sport", "0", "a_b-c", "x" * 200])
def test_allowed_names(name):
    assert file.check_domain_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "../sport", "a/b", "a\\b", "/etc/passwd", "-a", "_a", "Sport", "a.b", "a b", "a\n", "a\0", "~", ".."],
)
def test_names_that_could_leave_the_folder(name, bare_search_path):
    for use in (file.check_domain_name, load_vector):
        with pytest.raises(VectorError, match="is not allowed: use lowercase letters"):
            use(name)


def test_a_vector_with_such_a_name_is_not_written(tmp_path, make_vector):
    with pytest.raises(VectorError, match=r"domain name '\.\./x' is not allowed"):
        write_vector(make_vector("../x"), tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def places(tmp_path, bare_search_path, monkeypatch) -> list[Path]:
    """All folders of the search path, first to last."""
    monkeypatch.setenv("STEERMOE_VECTORS", os.pathsep.join([str(tmp_path / "env1"), str(tmp_path / "env2")]))
    named = [tmp_path / name for name in ("given", "env1", "env2")]
    named[0].mkdir()
    return [
        *named,
        bare_search_path / "steering_vectors",
        tmp_path / "user-data/steermoe/steering_vectors",
        tmp_path / "packaged",
    ]


def test_search_path_order(places):
    assert library.search_path(places[0]) == places
    assert library.search_path() == places[1:]


@pytest.mark.parametrize("first", range(6))
def test_an_earlier_folder_wins(places, make_vector, first):
    for number, place in enumerate(places[first:], first):
        write_vector(make_vector(info=VectorInfo(title=str(number))), place / "tiny-mixtral" / "sport.safetensors")
    assert load_vector("sport", folder=places[0]).info.title == str(first)


def test_the_packaged_folder_of_a_checkout_is_beside_the_package():
    assert library.packaged_vectors().name == "steering_vectors"
    assert library.packaged_vectors().parent in (library.PACKAGE, library.PACKAGE.parent)


def test_what_is_found(places, make_vector):
    files = [
        "food.safetensors",
        "model/sport.safetensors",
        ".hidden.safetensors",
        "Upper.safetensors",
        "model/notes.txt",
    ]
    for name in [*files, "model/deeper/law.safetensors"]:
        (places[0] / name).parent.mkdir(parents=True, exist_ok=True)
        (places[0] / name).touch()
    found = [(file.domain, file.group, file.path) for file in find_vectors(places[0])]
    assert found == [("food", "", places[0] / files[0]), ("sport", "model", places[0] / files[1])]


def test_unknown_domain_lists_the_known_ones(places, make_vector):
    for domain in ("food", "sport"):
        write_vector(make_vector(domain), places[0] / "m" / f"{domain}.safetensors")
    with pytest.raises(VectorNotFound, match="no vector 'law'; there are food, sport") as error:
        load_vector("law", folder=places[0])
    assert all(str(place) in str(error.value) for place in places)
    with pytest.raises(VectorNotFound, match="no vector 'sport' for other; there are none"):
        load_vector("sport", folder=places[0], group="other")


def test_group_narrows_the_search(places, make_vector):
    for group in ("a", "b"):
        write_vector(make_vector(info=VectorInfo(title=group)), places[0] / group / "sport.safetensors")
    assert load_vector("sport", folder=places[0]).info.title == "a"
    assert load_vector("sport", folder=places[0], group="b").info.title == "b"


def test_a_path_is_taken_as_it_is(good_file, bare_search_path):
    assert load_vector(good_file).domain == "sport"
    assert load_vector(str(good_file)).domain == "sport"


# ---- a folder that hides shipped vectors ----


def test_a_file_of_the_working_folder_that_hides_a_shipped_one_is_named_once(
    bare_search_path, tmp_path, make_vector, tiny_model, caplog
):
    own = bare_search_path / "steering_vectors" / "tiny-mixtral" / "sport.safetensors"
    for path in (own, tmp_path / "packaged" / "tiny-mixtral" / "sport.safetensors"):
        write_vector(make_vector(), path)
    write_vector(make_vector("food"), own.with_name("food.safetensors"))
    write_vector(make_vector("food", layers=range(4)), tmp_path / "packaged" / "other" / "food.safetensors")
    for _ in range(2):
        for domain in ("sport", "food"):  # food's shipped file is for another model
            load_vector(domain, tiny_model.model)
    load_vector(own, tiny_model.model)
    assert caplog.messages == [
        f"using '{own}' of the working folder, not the vector of that name that comes with steermoe"
    ]


@pytest.mark.parametrize(
    "use",
    [
        lambda shape: vectors_for(shape),
        lambda shape: vectors_for(shape, ["sport"]),
        lambda shape: load_vector("sport"),
        lambda shape: first_file("sport", group="tiny-mixtral"),
    ],
    ids=["all", "named", "no model", "file"],
)
def test_whatever_takes_such_a_file_names_it(bare_search_path, tmp_path, make_vector, tiny_model, caplog, use):
    own = bare_search_path / "steering_vectors" / "tiny-mixtral" / "sport.safetensors"
    for path in (own, tmp_path / "packaged" / "tiny-mixtral" / "sport.safetensors"):
        write_vector(make_vector(), path)
    use(tiny_model.shape)
    assert caplog.messages == [
        f"using '{own}' of the working folder, not the vector of that name that comes with steermoe"
    ]


# ---- fit to a model ----


def test_the_first_file_that_fits_the_model_is_taken(places, make_vector, tiny_model):
    write_vector(make_vector(layers=range(4)), places[0] / "a" / "sport.safetensors")
    write_vector(make_vector(info=VectorInfo(architecture="qwen3_moe")), places[0] / "b" / "sport.safetensors")
    write_vector(make_vector(info=VectorInfo(title="right")), places[1] / "c" / "sport.safetensors")
    assert load_vector("sport", tiny_model.model, folder=places[0]).info.title == "right"


@pytest.mark.parametrize("folder", ["0", "9"])
def test_the_model_s_own_vector_is_taken(places, make_vector, tiny_model, folder):
    """Another model's has the same shape and is found before it or after it."""
    of = {"5": VectorInfo(model="tiny-mixtral", title="own"), folder: VectorInfo(model="acme/base", title="foreign")}
    for name, info in of.items():
        write_vector(make_vector(info=info), places[0] / name / "sport.safetensors")
    assert load_vector("sport", tiny_model.shape, folder=places[0]).info.title == "own"
    assert library.vectors_for(tiny_model.shape, folder=places[0])["sport"].info.title == "own"
    assert PlanResolver(tiny_model.shape, places[0]).plan(SteeringSpec(("sport",))).vector.info.title == "own"
    path = places[0] / folder / "sport.safetensors"  # on request
    assert load_vector(path, tiny_model.shape).info.title == "foreign"
    assert PlanResolver(tiny_model.shape).plan(SteeringSpec((str(path),))).vector.info.title == "foreign"


def test_another_model_s_vector_is_not_taken_unasked(places, make_vector, tiny_model):
    info = VectorInfo(model="acme/base")
    write_vector(make_vector(info=info), places[0] / "base" / "sport.safetensors")
    message = r"'sport' was built for acme/base, and tiny-mixtral has none of its own: build one .* or name the file"
    resolver = PlanResolver(tiny_model.shape, places[0], names_only=True)
    for use in (
        lambda: load_vector("sport", tiny_model.shape, folder=places[0]),
        lambda: library.vectors_for(tiny_model.shape, ["sport"], folder=places[0]),
        lambda: resolver.plan(SteeringSpec(("sport",))),
    ):
        with pytest.raises(CompatibilityError, match=message) as error:
            use()
        assert str(places[0]) not in str(error.value)
    assert resolver.domains() == []
    with pytest.raises(VectorNotFound, match="no vector fits tiny-mixtral"):
        library.vectors_for(tiny_model.shape, folder=places[0])


@pytest.mark.parametrize(
    ("model", "built_for", "is_own"),
    [
        ("Sparse-8B-Instruct", "acme/Sparse-8B-Instruct", True),
        ("sparse-8b-instruct-Q4_K_M", "acme/Sparse-8B-Instruct", True),
        ("sparse-8b.q8_0", "Sparse 8B", True),
        ("other/sparse-8b-FP8", "sparse-8b", True),
        ("sparse-8b-0123456789ab", "sparse-8b", True),  # a version in the cache
        ("0123456789abcdef0123456789abcdef01234567", "acme/sparse-8b", True),  # a snapshot of the hub: it may be
        ("sparse-8b", "", True),
        ("sparse-8b-instruct", "sparse-8b", False),
        ("sparse-8b-thinking", "sparse-8b-instruct", False),
        ("sparse-8b-2507", "sparse-8b", False),
    ],
)
def test_whose_vector_it_is(model, built_for, is_own):
    assert RoutingShape(model, (), ()).is_named(built_for) == is_own
    assert RoutingShape("model-q8_0", (), (), (model,)).is_named(built_for) == is_own  # the name in a GGUF file
    assert RoutingShape("MixtralForCausalLM", (), (), ("",)).is_named(built_for)  # not known


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("models--acme--Sparse-8B-Instruct/snapshots/0123456789abcdef0123456789abcdef01234567", "Sparse-8B-Instruct"),
        ("models--sparse/snapshots/0123456789abcdef0123456789abcdef01234567", "sparse"),
        ("a/b/0123456789abcdef0123456789abcdef01234567", "0123456789abcdef0123456789abcdef01234567"),
        ("models--acme--sparse/snapshots/main", "main"),
        ("sparse", "sparse"),
    ],
)
def test_what_a_folder_calls_its_model(folder, name):
    """Else a snapshot of the hub would be nobody's, and the first vector of its shape would be taken."""
    assert name_of(Path(folder)) == name


@pytest.mark.parametrize("make", [Path.touch, lambda path: None])
def test_a_folder_of_vectors_that_is_not_there_is_not_skipped(places, make_vector, make):
    write_vector(make_vector(), places[1] / "m" / "sport.safetensors")
    make(places[0] / "gone")
    with pytest.raises(VectorNotFound, match=r"there is no folder of vectors '.*gone': name one, or leave it out"):
        load_vector("sport", folder=places[0] / "gone")
    assert load_vector("sport").domain == "sport"


def test_a_mixture_of_two_models_is_nobody_s_own(make_vector):
    parts = [(make_vector(info=VectorInfo(model=name)), 0.5) for name in ("base", "instruct", "base")]
    assert mix(parts).info.model == "base+instruct"
    assert mix(parts[::2]).info.model == "base"


def test_a_vector_of_a_foreign_model(places, make_vector, tiny_model):
    path = places[0] / "a" / "sport.safetensors"
    write_vector(make_vector(layers=range(4), info=VectorInfo(model="big")), path)
    for name in ("sport", path):
        with pytest.raises(
            CompatibilityError, match="'sport' has 4x8 experts, tiny-mixtral has 3x8: it was built for big"
        ):
            load_vector(name, tiny_model.model, folder=places[0])


# ---- atomic writes ----


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("method", ["write_bytes", "replace"])
def test_an_interrupted_write_leaves_the_old_file(good_file, make_vector, monkeypatch, method, error):
    before = good_file.read_bytes()

    def fail(*args):
        raise error

    monkeypatch.setattr(Path, method, fail)
    with pytest.raises((KeyboardInterrupt, VectorError)):
        write_vector(make_vector("food"), good_file)
    monkeypatch.undo()
    assert good_file.read_bytes() == before
    assert list(good_file.parent.iterdir()) == [good_file]


def test_atomic_path(tmp_path):
    target = tmp_path / "file"
    with atomic_path(target) as partial:
        partial.write_text("new")
        assert partial.parent == tmp_path
        assert not target.exists()
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_a_file(good_file, make_vector):
    with pytest.raises(VectorError, match=r"can't write .*: File exists"):
        write_vector(make_vector(), good_file / "sport.safetensors")


# ---- the authors' JSON ----


def matrix_file(tmp_path: Path, content) -> Path:
    path = tmp_path / "matrix.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_import_of_an_expert_vector(tmp_path):
    vector = import_matrix(matrix_file(tmp_path, [[0, 0.25, 0], [0.5, 0, 0.125]]), "sport")
    assert vector.experts.tolist() == [[0, 0.25, 0], [0.5, 0, 0.125]]
    assert (vector.domain, vector.layers, vector.frequency) == ("sport", (0, 1), None)


def test_import_of_frequencies(tmp_path):
    vector = import_matrix(matrix_file(tmp_path, [[0.5, 0.25, 0.25], [1, 0, 0]]), "sport", layers=[3, 4])
    assert vector.weights is None
    assert vector.layers == (3, 4)
    assert vector.with_threshold(1).experts.tolist() == [[0.5, 0, 0], [1, 0, 0]]


def test_imported_vectors_can_be_written(tmp_path):
    vector = import_matrix(matrix_file(tmp_path, "\ufeff[[0, 0.5]]"), "sport", info=VectorInfo(model="tiny"))
    write_vector(vector, tmp_path / "sport.safetensors")
    back = read_vector(tmp_path / "sport.safetensors")
    assert torch.equal(back.experts, vector.experts)
    assert back.info == VectorInfo(model="tiny", created_by="steermoe vectors import")


FLAT = [0, 0.3, 0, 0, 0, 0.3]
ROWS = [[0, 0.3, 0], [0, 0, 0.3]]


@pytest.mark.parametrize(
    ("content", "options"),
    [
        (FLAT, {}),
        ({"embedding": FLAT}, {}),
        ({"embedding": ROWS}, {}),
        ({"sport": FLAT, "food": [1] * 6}, {}),
        ({"3": {"embedding": FLAT, "size": 9}, "4": {}}, {"cluster": "3"}),
        ({"only": ROWS}, {}),
        ([[0, 0, 0], *ROWS], {}),
        ([0, 0, 0, *FLAT], {"experts": 3}),
        ([0, 0, 0, *FLAT], {}),
    ],
)
def test_import_of_the_authors_forms(tmp_path, content, options):
    """Also with a row of zeros for a dense first layer, which the model does not route."""
    vector = import_matrix(matrix_file(tmp_path, content), "sport", layers=[1, 2], **options)
    assert vector.layers == (1, 2)
    assert torch.equal(vector.experts, torch.tensor(ROWS))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64"])
def test_import_of_npy(tmp_path, dtype):
    np.save(tmp_path / "m.npy", np.array([[0, 1, 0], [0, 0, 2]], dtype))
    assert import_matrix(tmp_path / "m.npy", "sport").experts.tolist() == [[0, 1, 0], [0, 0, 2]]
    np.save(tmp_path / "by_columns.npy", np.array([[0, 0], [1, 0], [0, 2]], dtype).T)
    assert import_matrix(tmp_path / "by_columns.npy", "sport").experts.tolist() == [[0, 1, 0], [0, 0, 2]]
    np.save(tmp_path / "flat.npy", np.array([0, 1, 0, 0, 0, 2], dtype))
    assert import_matrix(tmp_path / "flat.npy", "sport", layers=[0, 1]).experts.tolist() == [[0, 1, 0], [0, 0, 2]]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (FLAT, {"layers": None}, "is a flat list of 6 numbers, .*: pass --model"),
        (FLAT, {"layers": range(4)}, "for 4 layers: it is for another model"),
        (FLAT, {"experts": 4}, "for 2 layers and 4 experts: it is for another model"),
        ({"a": FLAT, "b": FLAT}, {}, "names no cluster to take, there are 'a', 'b': pass --cluster"),
        ({"a": FLAT}, {"cluster": "c"}, "has no cluster 'c', there are 'a'"),
        ({}, {}, "there are none"),
        (ROWS, {"cluster": "a"}, "holds one vector, no clusters: leave out --cluster"),
        ({"embedding": {"a": 1}}, {}, "is not a matrix"),
        ([[0.5, 0, 0], *ROWS], {}, "has 3 rows, expected one for each of 2 layers"),
    ],
)
def test_forms_that_do_not_fit(tmp_path, content, options, message):
    with pytest.raises(VectorError, match=message):
        import_matrix(matrix_file(tmp_path, content), "sport", **{"layers": [1, 2], **options})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.array([{}]), "of objects"),
        (np.zeros((2, 2, 2)), "holds 3 dimensions of float64"),
        (np.array(["a"]), "holds 1 dimensions of <U1"),
        (b"\x93NUMPY\x01", "is a damaged .npy file"),
        (b"\xff\xfe\x00", "is neither JSON nor .npy"),
    ],
    ids=str,
)
def test_npy_that_is_no_matrix(tmp_path, content, message):
    path = tmp_path / "m.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    with pytest.raises(VectorError, match=message) as caught:
        import_matrix(path, "sport")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[1, 2", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("", "is not JSON"),
        ({"a": 1}, "expected a list of L lists of N numbers"),
        ([], "expected a list of L lists"),
        ([1, 2], "expected a list of L lists"),
        ([["a", "b"]], "expected a list of L lists"),
        ([[True, False]], "expected a list of L lists"),
        ([[None, 0.5]], "expected a list of L lists"),
        ([[0.1, 0.2], [0.3]], r"different lengths \[1, 2\]"),
        ([[0.5], [0.5]], r"shape \[2, 1\], expected 2 layers x 2 or more experts"),
        ([[]], "only zeros"),
        ([[0, 0], [0, 0]], "only zeros"),
        ("[[NaN, 1]]", "NaN or infinity"),
        ("[[1e400, 1]]", "NaN or infinity"),
        (f"[[1{'0' * 400}, 1]]", "too large for float32"),
    ],
)
def test_files_that_are_not_a_matrix(tmp_path, content, message):
    with pytest.raises(VectorError, match=message):
        import_matrix(matrix_file(tmp_path, content), "sport")


def test_import_checks_layers_name_and_file(tmp_path):
    path = matrix_file(tmp_path, [[0, 0.5], [0.5, 0]])
    with pytest.raises(VectorError, match="has 2 rows, expected one for each of 3 layers"):
        import_matrix(path, "sport", layers=[0, 1, 2])
    with pytest.raises(VectorError, match="is not allowed"):
        import_matrix(path, "../sport")
    with pytest.raises(VectorNotFound, match=r"can't read .*No such file"):
        import_matrix(tmp_path / "none.json", "sport")
