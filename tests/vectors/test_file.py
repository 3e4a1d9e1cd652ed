"""Vector files under any damage, the hash of the header, and files of the first format."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from steermoe.errors import VectorError
from steermoe.vectors import file
from steermoe.vectors.file import MATRICES, header_sha256, read_header, read_vector, tensors_sha256, write_vector
from steermoe.vectors.library import packaged_vectors
from steermoe.vectors.vector import SteeringVector, VectorInfo, format_layers

VECTOR = SteeringVector(
    "sport",
    torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]]),
    (1, 4),
    baseline=torch.full((2, 3), 1 / 3),
    relative=True,
    threshold=1.5,
    info=VectorInfo(title="Sp\u00f6rt", keywords=("team",), strength=4.0, safe_range=(0.0, 6.0), formula="additive"),
)


def facts(vector: SteeringVector) -> tuple:
    """Everything that a vector consists of."""
    matrices = [getattr(vector, name) for name in MATRICES]
    numbers = tuple(None if matrix is None else tuple(map(tuple, matrix.tolist())) for matrix in matrices)
    return (vector.domain, vector.layers, vector.threshold, vector.relative, vector.info, numbers)


def header_of(path: Path) -> dict:
    with safe_open(path, "np") as content:
        return json.loads(content.metadata()["steermoe"])


@pytest.fixture
def good(tmp_path) -> bytes:
    write_vector(VECTOR, tmp_path / "good.safetensors")
    return (tmp_path / "good.safetensors").read_bytes()


EDITS = st.lists(
    st.tuples(st.sampled_from(["replace", "insert", "delete", "cut", "swap"]), st.floats(0, 1), st.binary(max_size=4)),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits) -> bytes:
    for kind, share, other in edits:
        at = round(share * len(content))
        match kind:
            case "replace":
                content = content[:at] + other + content[at + len(other) :]
            case "insert":
                content = content[:at] + other + content[at:]
            case "delete":
                content = content[:at] + content[at + len(other) :]
            case "cut":
                content = content[:at]
            case "swap":
                content = content[:at] + content[at : at + 2][::-1] + content[at + 2 :]
    return content


@pytest.mark.fuzz
@given(edits=EDITS)
def test_a_damaged_file_is_the_same_vector_or_an_error(tmp_path, good, edits):
    path = tmp_path / "sport.safetensors"
    path.write_bytes(edited(good, edits))
    try:
        found = read_vector(path)
    except VectorError as error:
        message = str(error)
        assert message.isprintable()
        assert len(message) < 600
    else:
        assert facts(found) == facts(VECTOR)


@pytest.mark.fuzz
@given(share=st.floats(0, 1), digit=st.integers(0, 9))
def test_another_digit_in_the_header_is_an_error(tmp_path, good, share, digit):
    """Every digit: those of the strength, the layers, the hashes, the offsets of the matrices ..."""
    end = 8 + int.from_bytes(good[:8], "little")
    places = [at for at in range(8, end) if good[at : at + 1].isdigit()]
    at = places[min(int(share * len(places)), len(places) - 1)]
    path = tmp_path / "sport.safetensors"
    path.write_bytes(good[:at] + str(digit).encode() + good[at + 1 :])
    if good[at : at + 1] == str(digit).encode():
        assert facts(read_vector(path)) == facts(VECTOR)
    else:
        with pytest.raises(VectorError):
            read_vector(path)


@pytest.mark.parametrize(
    "change",
    [
        {"domain": "food"},
        {"layers": [1, 5]},
        {"threshold": 3.0},
        {"relative": False},
        {"info": {"strength": 4.0}},
        {"num_experts": 4},
    ],
)
def test_the_hash_covers_all_of_the_header(tmp_path, good, change):
    path = tmp_path / "good.safetensors"
    header = header_of(path)
    tensors = {name: getattr(VECTOR, name) for name in ("frequency", "baseline")}
    save_file(tensors, path, {"steermoe": json.dumps({**header, **change})})
    for read in (read_header, read_vector):
        with pytest.raises(VectorError, match=r"header .* does not match the hash in it"):
            read(path)


@pytest.mark.parametrize("change", [{"layers": [-1, 3]}, {"threshold": float("nan")}, {"threshold": float("inf")}])
def test_a_header_that_no_vector_can_have_is_refused_without_the_matrices(tmp_path, good, change):
    path = tmp_path / "good.safetensors"
    header = {**header_of(path), **change}
    header["sha256"] = header_sha256(header)
    save_file({"frequency": VECTOR.frequency}, path, {"steermoe": json.dumps(header)})
    with pytest.raises(VectorError, match=f"its {next(iter(change))} .* must be"):
        read_header(path)


def test_both_hashes_are_in_the_header(tmp_path, good):
    header = read_header(tmp_path / "good.safetensors")
    assert header.sha256 == header_sha256(header_of(tmp_path / "good.safetensors"))
    assert header.tensors_sha256 == tensors_sha256({"frequency": VECTOR.frequency, "baseline": VECTOR.baseline})
    assert header.as_dict()["sha256"] == header.sha256


def test_a_file_of_the_first_format_is_read(tmp_path, good):
    """As steermoe 0.2.0 wrote it: no hash of the header."""
    path = tmp_path / "old.safetensors"
    header = {**header_of(tmp_path / "good.safetensors"), "format_version": 1}
    del header["sha256"]
    tensors = {name: getattr(VECTOR, name) for name in ("frequency", "baseline")}
    path.write_bytes(save(tensors, {"steermoe": json.dumps(header, sort_keys=True)}))
    assert facts(read_vector(path)) == facts(VECTOR)
    assert read_header(path).sha256 is None


def test_shipped_files_have_the_full_hash():
    paths = sorted(packaged_vectors().glob("*/*.safetensors"))
    assert len(paths) >= 8
    assert all(read_header(path).sha256 for path in paths)


# ---- sizes ----


def test_a_long_header_is_not_parsed(tmp_path):
    path = tmp_path / "long.safetensors"
    save_file({"frequency": torch.full((2, 4), 0.25)}, path, {"steermoe": " " * file.MAX_HEADER_BYTES})
    for read in (read_header, read_vector):
        with pytest.raises(VectorError, match=r"it has 10\d+ bytes, 10\d+ of them in its header; a vector file has"):
            read(path)


def test_huge_matrices_are_not_read(tmp_path):
    """A sparse file of 1 TiB."""
    count, path = 2**38, tmp_path / "huge.safetensors"
    header = {
        "format_version": 1,
        "domain": "sport",
        "layers": [0, 1],
        "num_experts": 4,
        "threshold": 3.0,
        "relative": False,
        "tensors_sha256": "0" * 64,
        "info": {},
    }
    tensor = {"dtype": "F32", "shape": [2, count // 2], "data_offsets": [0, 4 * count]}
    text = json.dumps({"__metadata__": {"steermoe": json.dumps(header)}, "frequency": tensor}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with path.open("r+b") as content:
        content.truncate(8 + len(text) + 4 * count)
    for read in (read_header, read_vector):
        with pytest.raises(VectorError, match=r"it has 10\d+ bytes, .*; a vector file has at most 268435456 and"):
            read(path)


def test_layers_far_apart_are_formatted_without_a_list_of_all_between():
    assert format_layers((0, 10**15)) == f"0, {10**15}"
