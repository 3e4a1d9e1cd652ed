"""Files of other tools: each is recognised, gives its vector, and under any damage a vector or one of our errors."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steermoe.errors import CompatibilityError, VectorError, VectorNotFound
from steermoe.routing.shape import RouterShape, RoutingShape
from steermoe.vectors import importing
from steermoe.vectors.exporting import EXPORT_FORMATS, exported
from steermoe.vectors.file import read_vector, write_vector
from steermoe.vectors.formats import content
from steermoe.vectors.formats.cells import ACTIVATED, DEACTIVATED
from steermoe.vectors.importing import IMPORT_FORMATS, import_vector
from steermoe.vectors.vector import SteeringVector, VectorInfo
from tests.support import other_tools
from tests.support.other_tools import SCORES
from tests.vectors.test_file import EDITS, edited

DSMOE = float(np.log(1.1))


def shape(layers=(0, 1), experts=4, top_k=2) -> RoutingShape:
    return RoutingShape("tiny", ("tiny",), tuple(RouterShape(layer, experts, experts, top_k) for layer in layers))


DS4_SHAPE = shape(range(3, 43), 256, 6)
FORMULA_5 = ("zero_max_scaled", ACTIVATED)
MADE = {
    "easysteer": (other_tools.easysteer, shape()),
    "steermoe": (other_tools.ranking, None),
    "dsmoe": (other_tools.dsmoe, shape()),
    "ds4": (other_tools.ds4, DS4_SHAPE),
    "ds4 report": (other_tools.ds4_report, DS4_SHAPE),
    "csv": (other_tools.csv, None),
    "npz": (other_tools.npz, shape((1, 2))),
}


def imported(tmp_path, data: bytes, **options) -> SteeringVector:
    path = tmp_path / "given"
    path.write_bytes(data)
    return import_vector(path, "sport", **options)


@pytest.mark.parametrize("kind", MADE)
def test_each_file_is_recognised_and_gives_its_vector(tmp_path, kind):
    make, model = MADE[kind]
    vector = imported(tmp_path, make(), shape=model, cluster="12" if kind == "npz" else None)
    name = kind.split(" ")[0].replace("npz", "matrix")
    assert name in IMPORT_FORMATS
    assert vector.info.created_by == "steermoe vectors import" + (f" ({name})" if name != "matrix" else "")
    if name == "easysteer":
        expected = [[1, DEACTIVATED, 0, 1], [0, 0, DEACTIVATED, 0]]
    elif name == "ds4":
        expected = np.where(other_tools.ds4_map() < 0, DEACTIVATED, other_tools.ds4_map())[3:].tolist()
    else:
        expected = SCORES.tolist()
    assert torch.equal(vector.experts, torch.tensor(expected))
    has_rule = name in ("easysteer", "ds4")
    assert (vector.info.formula, vector.info.strength) == (FORMULA_5 if has_rule else (None, None))
    write_vector(vector, tmp_path / "sport.safetensors")
    assert torch.equal(read_vector(tmp_path / "sport.safetensors").experts, vector.experts)


@pytest.mark.parametrize(
    ("make", "top", "bottom", "expected", "rule"),
    [
        (other_tools.ranking, 1, None, [[0, 0, 0, 0], [0, 1, 0, 0]], FORMULA_5),
        (other_tools.ranking, 2, 1, [[1, 0, 0, 0], [0, 1, DEACTIVATED, 0]], FORMULA_5),
        (other_tools.csv, None, 2, [[0, DEACTIVATED, 0, 0], [0, 0, DEACTIVATED, 0]], FORMULA_5),
        (other_tools.dsmoe, 3, None, [[1, 0, 0, 1], [0, 1, 0, 0]], ("additive", DSMOE)),
        (other_tools.dsmoe, 1, 1, [[0, 0, 0, 0], [0, 1, -1, 0]], ("additive", DSMOE)),
    ],
)
def test_the_best_of_a_list_of_scores_steer_as_in_their_paper(tmp_path, make, top, bottom, expected, rule):
    vector = imported(tmp_path, make(), shape=shape(), top=top, bottom=bottom)
    assert vector.experts.tolist() == expected
    assert (vector.info.formula, vector.info.strength) == rule


def test_a_layer_activates_at_most_k_experts(tmp_path):
    vector = imported(tmp_path, other_tools.ranking(), shape=shape(top_k=1), top=4)
    assert vector.experts.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]


def test_a_ranking_is_numbered_by_router(tmp_path):
    """SteerMoE stacks the routers that it saw; with a dense first layer the first row is that of layer 1."""
    assert imported(tmp_path, other_tools.ranking(), shape=shape((1, 2))).layers == (1, 2)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_ranking_in_every_protocol(tmp_path, protocol):
    assert torch.equal(imported(tmp_path, other_tools.ranking(protocol)).experts, torch.from_numpy(SCORES))


def test_npz_and_dictionaries_name_their_clusters(tmp_path):
    with pytest.raises(VectorError, match="names no cluster to take, there are '0', '12': pass --cluster"):
        imported(tmp_path, other_tools.npz(), shape=shape((1, 2)))
    file = io.BytesIO()
    np.savez_compressed(file, sport=SCORES)
    assert torch.equal(imported(tmp_path, file.getvalue()).experts, torch.from_numpy(SCORES))


@pytest.mark.parametrize("top", [None, 1])
def test_a_table_of_some_experts_is_as_large_as_its_model(tmp_path, top):
    """Experts 0 to n of each of its layers look like all of them."""
    vector = imported(tmp_path, b"layer,expert,weight\n1,0,1\n", shape=shape(), top=top)
    assert (vector.layers, vector.experts.tolist()) == ((0, 1), [[0, 0, 0, 0], [1, 0, 0, 0]])


def test_the_layers_of_our_json_must_be_those_of_the_model(tmp_path):
    data = exported(SteeringVector("sport", None, (5, 6), weights=torch.from_numpy(SCORES)), "json")[0]
    with pytest.raises(VectorError, match="lists the layers 5-6, expected 0-1: it is for another model"):
        imported(tmp_path, data, shape=shape())
    with pytest.raises(VectorError, match="lists the layers none, expected 0-1"):
        imported(tmp_path, data.replace(b"[5, 6]", b"[]"), shape=shape())
    assert imported(tmp_path, data, shape=shape((5, 6))).layers == (5, 6)
    dense = SteeringVector("sport", None, (0, 1, 2), weights=torch.from_numpy(np.vstack([0 * SCORES[:1], SCORES])))
    assert imported(tmp_path, exported(dense, "json")[0], shape=shape((1, 2))).layers == (1, 2)


def test_raw_numbers_of_another_model_need_it(tmp_path):
    experts = np.array([[0, 0, 0, 0], [0.5, 0, 0, -2]], dtype="<f4")
    vector = imported(tmp_path, experts.tobytes(), format="ds4", shape=shape((1,)))
    assert (vector.experts.tolist(), vector.info.strength) == ([[0.5, 0, 0, -2]], None)


# ---- round trips ----


@pytest.mark.parametrize("format", EXPORT_FORMATS)
def test_what_is_exported_comes_back(tmp_path, format):
    frequency = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]])
    vector = SteeringVector("sport", frequency, (3, 7), threshold=1.1, info=VectorInfo(model="tiny", strength=4.0))
    data, left_out = exported(vector, format)
    back = imported(tmp_path, data, shape=shape((3, 7)))
    expected = vector.experts.sign() if format == "easysteer" else vector.experts
    assert (back.layers, left_out) == ((3, 7), 0)
    assert torch.equal(back.experts, expected)
    if format != "easysteer":
        alone = imported(tmp_path, data)
        assert alone.layers == (3, 7)
        assert torch.equal(alone.experts, expected)


@pytest.mark.parametrize("format", EXPORT_FORMATS)
def test_frequencies_without_a_threshold_are_not_cut_again(tmp_path, format):
    vector = SteeringVector("sport", torch.tensor([[0.5, 0.25, 0.125, 0.125]]), (0,), threshold=0)
    back = imported(tmp_path, exported(vector, format)[0], shape=shape((0,)))
    assert torch.equal(back.experts, vector.experts.sign() if format == "easysteer" else vector.experts)


def test_easysteer_gets_at_most_k_experts_of_a_layer():
    weights = torch.tensor([[0.5, 0.75, 0.25, -1.0]])
    vector = SteeringVector("sport", None, (2,), weights=weights, info=VectorInfo(top_k=2))
    data, left_out = exported(vector, "easysteer")
    config = {"mode": "activate", "activate_ids": [0, 1], "deactivate_ids": [3]}
    assert (json.loads(data), left_out) == ({"layer_configs": {"2": config}}, 1)


def test_gguf_is_no_control_vector(tmp_path):
    """llama.cpp adds what is called direction.N to the residual."""
    from gguf import GGUFReader

    vector = SteeringVector("sport", None, (3, 7), weights=torch.from_numpy(SCORES), info=VectorInfo(model="tiny"))
    (tmp_path / "v.gguf").write_bytes(exported(vector, "gguf")[0])
    file = GGUFReader(tmp_path / "v.gguf")
    assert file.fields["general.architecture"].contents() == "routervector"
    assert file.fields["routervector.model_hint"].contents() == "tiny"
    assert {tensor.name: tensor.data.tolist() for tensor in file.tensors} == {
        "router.3": SCORES[0].tolist(),
        "router.7": SCORES[1].tolist(),
    }


# ---- what is refused ----


class Evil:
    def __reduce__(self):
        return (eval, ("open('ran', 'w').close()",))


def with_evil() -> bytes:
    import pandas as pd

    return pickle.dumps(pd.DataFrame({"layer": [0], "expert": [Evil()]}))


LAYER = '{"layer_configs": {"0": '
BIG = b"GGUF" + (3).to_bytes(4, "little") + (1).to_bytes(8, "little") + (2**60).to_bytes(8, "little")
TWO_LAYERS = SteeringVector("sport", None, (1, 10), weights=torch.from_numpy(SCORES))
TWIN = SteeringVector("sport", None, (3, 4), weights=torch.from_numpy(SCORES))


def npz_with_one_name_twice() -> bytes:
    array, file = io.BytesIO(), io.BytesIO()
    np.save(array, SCORES)
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("sport.npy", "sport"):
            archive.writestr(name, array.getvalue())
    return file.getvalue()


TWICE = npz_with_one_name_twice()
REFUSED = [
    (pickle.dumps(Evil()), {}, r"is a pickle that asks for 'builtins.eval': expected a table of pandas"),
    (with_evil(), {}, r"asks for 'builtins.eval'"),
    (pickle.dumps([1, 2]), {}, "is a pickle, but not of a table as pandas"),
    (pickle.dumps({1: 2}), {}, "asks for entries whose names are no text"),
    (b"\x80\x04cos\nsystem\n.", {}, "asks for 'os.system'"),
    (b"\x80\x04\x82\x01.", {}, "asks for the step EXT1"),
    (b"\x80\x04r\xff\xff\xff\xff.", {}, "is a damaged pickle"),
    (b"\x80\x04", {}, "is a damaged pickle"),
    (other_tools.ranking(scores=np.full((2, 4), np.nan)), {}, "the weight of expert . in layer . is nan"),
    (other_tools.ranking(), {"shape": shape((0, 1, 2))}, "is for 2 layers, tiny has 3 with routers: it is for"),
    (other_tools.ranking(), {"shape": shape(experts=8)}, "vector 'sport' has 2x4 experts, tiny has 2x8"),
    (other_tools.ranking(), {"top": 5}, r"has 4 experts with a score above 0, --top asks for 5: lower it"),
    (other_tools.ranking(), {"cluster": "1"}, r"holds one vector \(steermoe\), no clusters"),
    (other_tools.easysteer(), {}, "does not say how many experts a layer has: pass --model"),
    (other_tools.easysteer(), {"top": 1}, r"holds no scores \(easysteer\)"),
    (other_tools.easysteer(), {"shape": shape(experts=3)}, "names expert 3 of layer 0, tiny has 0 to 2"),
    (other_tools.easysteer(), {"shape": shape((0, 2))}, "has weights in layer 1, tiny has routers in 0, 2"),
    (b'{"layer_configs": {}}', {}, "has no layers"),
    (f'{LAYER}{{"mode": "soft_random", "expert_ids": [1]}}}}}}'.encode(), {}, "has mode 'soft_random', which depends"),
    (f'{LAYER}{{"expert_ids": [-1]}}}}}}'.encode(), {}, "an expert in expert_ids of layer 0 is -1, expected a whole"),
    (f'{LAYER}{{"expert_ids": 5}}}}}}'.encode(), {}, "expert_ids of layer 0 is 5, expected a list"),
    (
        b'{"layer_configs": {"0": {"mode": "soft", "expert_ids": [1]}, "1": {"expert_ids": [1]}}}',
        {"shape": shape()},
        "put them into two files",
    ),
    (other_tools.dsmoe(), {}, "does not say how many experts a layer has: pass --model"),
    (b'{"per_layer": {"0": {"1": {}}}}', {}, "expected an object with weighted_score"),
    (b'{"per_layer": {"0": {"1": {"weighted_score": "x"}}}}', {}, "the score of expert 1 in layer 0 is 'x'"),
    (b'{"per_layer": {"0": {"1": {"weighted_score": 1e39}}}}', {"shape": shape()}, r"is 1e\+39, expected a finite"),
    (other_tools.ds4()[:-4], {"format": "ds4"}, "has 44028 bytes, expected 44032: 43 x 256 numbers of float32"),
    (b"\0" * 44032, {}, "contains only zeros"),
    (b"layer,expert,weight\n0,0,0\n0,1,1e-60\n", {}, "contains only zeros, as float32"),
    (b'{"format": "ds4-expert-steering-v1", "shape": [43, 256], "layer_report": [1]}', {}, "is 1, expected an object"),
    (
        b"layer,expert\n0,1\n",
        {},
        "has no column weight: its first line is 'layer,expert', expected layer,expert,weight",
    ),
    (b"layer,expert,weight\n0,1\n", {}, "line 2: '0,1' lacks cells, expected layer,expert,weight"),
    (b"layer,expert,weight\n0,x,1\n", {}, "line 2, the expert is 'x', expected a whole number"),
    (b"layer,expert,weight\n0,0,x\n", {}, "line 2: weight 'x' is not a number"),
    (b"layer,expert,weight\n0,0,nan\n0,1,1\n", {}, "the weight of expert 0 in layer 0 is nan"),
    (b"layer,expert,weight\n0,0,1\n0,0,1\n", {}, "line 3: expert 0 of layer 0 is there twice"),
    (b"layer,expert,weight\n", {}, "has no lines below its first one"),
    (b"layer,expert,weight\n0,5,1\n", {}, "does not say how many experts a layer has: pass --model"),
    (b"layer,expert,weight\n0,99999,1\n", {"shape": shape()}, "names expert 99999 of layer 0, expected numbers from 0"),
    (
        b"layer,expert,weight\n1,4,0\n1,0,1\n1,1,0\n1,2,0\n1,3,0\n",
        {"shape": shape()},
        "names expert 4 of layer 1, tiny has 0 to 3",
    ),
    (
        b'{"per_layer": {"7": {"1": {"weighted_score": 1}}, "07": {}}}',
        {},
        "a layer is '07', but 7 is there already, expected each once: keep one",
    ),
    (
        b'{"per_layer": {"7": {"1": {"weighted_score": 1}, "01": {"weighted_score": 2}}}}',
        {},
        "an expert of layer 7 is '01', but 1 is there already",
    ),
    (b'{"layer_configs": {"7": {}, "07": {}}}', {}, "a layer is '07', but 7 is there already"),
    (
        b'{"format": "ds4-expert-steering-v1", "shape": [43, 256], "layer_report": [{"layer": 7}, {"layer": "07"}]}',
        {},
        "layer 7 is there twice in layer_report, expected each once: keep one",
    ),
    (
        b'{"per_layer": {"7": {"1": {"weighted_score": 1}}, "7": {"2": {"weighted_score": 1}}}}',
        {"shape": shape((7,))},
        "the key '7' is there twice in one object, expected each once: keep one",
    ),
    (b'{"embedding": [[1, 2]], "embedding": [[3, 4]]}', {}, "the key 'embedding' is there twice in one object"),
    (
        b'{"weights": true, "layers": [], "embedding": [[1, 2]]}',
        {},
        "lists the layers none, expected the decoder",
    ),
    (b"layer,expert,weight,weight\n0,0,1,5\n0,1,0,2\n", {}, "has several columns weight, expected layer,expert,weight"),
    (TWICE, {}, "holds two arrays 'sport', expected each once: keep one"),
    (b"GGUF", {}, "is a damaged GGUF file, or one of a model"),
    (
        exported(TWO_LAYERS, "gguf")[0].replace(b"router.10", b"router.01"),
        {},
        "has a tensor 'router.01', but one of layer 1 is there already",
    ),
    (exported(TWIN, "gguf")[0].replace(b"router.4", b"router.3"), {}, "is a damaged GGUF file"),
    (BIG, {}, "is a damaged GGUF file, or one of a model"),
    (b"PK\x03\x04", {}, "is a damaged .npz file"),
    (b"\xff\xfe\x00", {}, "is neither JSON nor .npy, .npz"),
    (b"layer,expert,weight\n0,0,1\n", {"format": "easysteer"}, "is not JSON"),
]


@pytest.mark.parametrize(("data", "options", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(tmp_path, monkeypatch, data, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((VectorError, CompatibilityError), match=message) as caught:
        imported(tmp_path, data, **options)
    assert str(caught.value).isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["given"]  # nothing in it ran


def test_a_control_vector_is_refused(tmp_path):
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "control.gguf", "controlvector")
    writer.add_tensor("direction.1", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        VectorError, match=r"has the architecture 'controlvector', .* a control vector, for the residual"
    ):
        import_vector(tmp_path / "control.gguf", "sport")


def test_huge_files_are_not_read(tmp_path, monkeypatch):
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(VectorError, match=r"has more than 67108864 bytes, which no vector needs"):
        import_vector(tmp_path / "huge.json", "sport")
    with pytest.raises(VectorNotFound, match="No such file or directory; give a file of one of JSON"):
        import_vector(tmp_path / "none.json", "sport")
    monkeypatch.setattr(content, "MAX_BYTES", 8)
    monkeypatch.setattr("steermoe.vectors.matrix.MAX_BYTES", 8)
    with pytest.raises(VectorError, match="more than 8 bytes"):
        imported(tmp_path, other_tools.npz())


# ---- any damage ----


FILES = {**{kind: made for kind, made in MADE.items() if kind != "ds4"}, "gguf": (None, None), "json": (None, None)}
VECTOR = SteeringVector("sport", None, (0, 1), weights=torch.from_numpy(SCORES))


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", FILES)
@given(edits=EDITS, forced=st.booleans())
def test_a_damaged_file_is_a_vector_or_an_error(tmp_path, kind, edits, forced):
    make, model = FILES[kind]
    data = exported(VECTOR, kind)[0] if make is None else make()
    name = {"npz": "matrix", "json": "matrix", "ds4 report": "ds4"}.get(kind, kind)
    try:
        found = imported(
            tmp_path,
            edited(data, edits),
            shape=model or shape(),
            format=name if forced else None,
            cluster="12" if kind == "npz" else None,
        )
    except (VectorError, CompatibilityError) as error:
        message = str(error)
        assert message.isprintable()
        assert len(message) < 600
    else:
        assert found.experts.isfinite().all()
        assert found.layers == (model or shape()).layers


def test_formats_have_readers():
    assert set(importing.SCORES) < set(IMPORT_FORMATS)
