"""`steermoe vectors`: answers on stdout, all else on stderr, exit codes, JSON, and every wrong input in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from steermoe.vectors.file import header_sha256, read_vector, write_vector
from steermoe.vectors.vector import SteeringVector, VectorInfo

INFO = VectorInfo(
    title="Sports",
    keywords=("team", "goal", "match", "coach"),
    model="tiny-mixtral",
    architecture="mixtral",
    top_k=2,
    strength=4.0,
    safe_range=(0.0, 6.0),
    texts=12,
    tokens=3400,
    licence="Apache-2.0",
)


@pytest.fixture
def vectors(bare_search_path, make_vector) -> Path:
    """./steering_vectors with two vectors for the tiny model."""
    folder = bare_search_path / "steering_vectors"
    baseline = torch.full((3, 8), 1 / 8)
    write_vector(make_vector("sport", info=INFO, baseline=baseline), folder / "tiny-mixtral" / "sport.safetensors")
    write_vector(make_vector("food"), folder / "tiny-mixtral" / "food.safetensors")
    return folder


@pytest.fixture
def matrix(bare_search_path) -> Path:
    path = bare_search_path / "matrix.json"
    path.write_text(json.dumps([[0, 0.5, 0, 0, 0, 0, 0, 0]] * 3))
    return path


def edit_header(path: Path, change, *, rehash: bool = False) -> None:
    """Change the header of a vector file, and nothing else but its hash if that is to be right again."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["steermoe"])
    change(header)
    if rehash:
        header["sha256"] = header_sha256(header)
    save_file(tensors, path, {"steermoe": json.dumps(header)})


def as_version_1(path: Path) -> None:
    """Make a file one of steermoe 0.2.0, whose hash covers the numbers alone."""

    def change(header):
        del header["sha256"]
        header["format_version"] = 1

    edit_header(path, change)


def one_line(text: str) -> str:
    """The only line of an error, without its newline."""
    assert text.count("\n") == 1, text
    return text[:-1]


# ---- list ----


def test_list(run, vectors):
    code, out, err = run("vectors", "list")
    header, food, sport = out.splitlines()
    assert (code, err) == (0, "")
    assert header.split() == ["domain", "model", "routers", "shape", "strength", "keywords", "file"]
    assert food.startswith("food")
    for text in (
        "sport",
        "tiny-mixtral",
        "3 x 8",
        "4",
        "team, goal, match, ...",
        "steering_vectors/tiny-mixtral/sport.s",
    ):
        assert text in sport


def test_list_json(run, vectors):
    code, out, err = run("vectors", "list", "--json")
    records = json.loads(out)
    assert (code, err) == (0, "")
    assert [record["domain"] for record in records] == ["food", "sport"]
    assert records[1]["keywords"] == ["team", "goal", "match", "coach"]
    assert (records[1]["layers"], records[1]["num_experts"], records[1]["strength"]) == ([0, 1, 2], 8, 4.0)
    assert Path(records[1]["path"]).is_file()


def test_list_of_nothing(run, bare_search_path):
    assert run("vectors", "list", "--json").out == "[]\n"
    code, out, err = run("vectors", "list")
    assert (code, out) == (0, "")
    assert str(bare_search_path / "steering_vectors") in one_line(err)


def test_list_searches_a_given_folder_first(run, vectors, make_vector, tmp_path):
    write_vector(make_vector("sport"), tmp_path / "mine" / "sport.safetensors")
    records = json.loads(run("vectors", "list", "--vectors", tmp_path / "mine", "--json").out)
    assert [Path(record["path"]).parent.name for record in records] == ["mine", "tiny-mixtral", "tiny-mixtral"]


def test_list_leaves_out_what_is_damaged(run, vectors):
    (vectors / "law.safetensors").write_bytes(b"nothing")
    code, out, err = run("vectors", "list", "--json")
    assert code == 0
    assert len(json.loads(out)) == 2
    assert "law.safetensors' is not a safetensors file" in one_line(err)


def test_control_characters_of_a_file_do_not_reach_the_terminal(run, bare_search_path, make_vector):
    evil = VectorInfo(title="a\x1b[31mb\r", keywords=("x\x07y\x9b",), model="m\x1b]0;t\x07")
    write_vector(make_vector(info=evil), bare_search_path / "steering_vectors" / "sport.safetensors")
    for arguments in (["list"], ["show", "sport"]):
        out = run("vectors", *arguments).out
        assert not set(out) & set("\x1b\x07\r\x9b")
        assert "[31mb" in out or arguments == ["list"]


# ---- show ----


def test_show(run, vectors):
    code, out, err = run("vectors", "show", "sport")
    assert (code, err) == (0, "")
    facts = (
        "Sports",
        "team, goal, match, coach",
        "tiny-mixtral",
        "3 x 8, decoder layers 0-2",
        "0 to 6",
        "3400",
        "Apache-2.0",
    )
    for fact in (*facts, "3 x the mean frequency", str(vectors / "tiny-mixtral" / "sport.safetensors")):
        assert fact in out
    assert "    1 ██··············\n" in out
    assert "3 of 24 experts are in the vector" in out


def test_show_a_file(run, vectors):
    path = vectors / "tiny-mixtral" / "food.safetensors"
    assert run("vectors", "show", path).out.startswith("food\n")


def test_show_json(run, vectors):
    code, out, err = run("vectors", "show", "sport", "--json")
    record = json.loads(out)
    assert (code, err) == (0, "")
    assert record["experts"] == {"0": {"0": 0.5}, "1": {"0": 0.5}, "2": {"0": 0.5}}
    assert record["safe_range"] == [0.0, 6.0]
    assert (record["domain"], record["texts"], record["matrices"]) == ("sport", 12, ["baseline", "frequency"])


@pytest.mark.parametrize(
    ("options", "kept", "cut"),
    [
        (["--threshold", "0"], 8, "0 x the mean frequency"),
        (["--threshold", "4"], 0, "4 x the mean frequency"),
        (["--relative"], 1, "3 x the corpus baseline"),
        (["--relative", "--threshold", "0.5"], 8, "0.5 x the corpus baseline"),
    ],
)
def test_show_another_cut(run, vectors, options, kept, cut):
    out = run("vectors", "show", "sport", *options).out
    assert f"{3 * kept} of 24 experts are in the vector" in out
    assert cut in out
    record = json.loads(run("vectors", "show", "sport", "--json", *options).out)
    assert sum(map(len, record["experts"].values())) == 3 * kept
    assert record["relative"] == ("--relative" in options)


def test_show_a_mixture(run, bare_search_path):
    weights = torch.tensor([[0.5, -0.5], [0.0, 0.25]])
    write_vector(SteeringVector("a+b", None, (0, 1), weights=weights), bare_search_path / "mix.safetensors")
    out = run("vectors", "show", "mix.safetensors").out
    assert "none: the weights are given" in out
    assert "▽ below 0" in out


def test_show_png(run, vectors, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, err = run("vectors", "show", "sport", "--json", "--png", tmp_path / "sport.png")
    assert code == 0
    assert json.loads(out)["domain"] == "sport"
    assert one_line(err) == f"picture in {tmp_path / 'sport.png'}"
    assert (tmp_path / "sport.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "no vector 'nope'; there are food, sport (searched:"),
        (["../sport"], "domain name '../sport' is not allowed"),
        (["none.safetensors"], "no vector file 'none.safetensors'"),
        (["sport", "--threshold", "-1"], "threshold -1.0 must be a finite number, 0 or more"),
        (["food", "--relative"], "store the corpus baseline"),
        (["sport", "--png", "none/x.png"], "can't write the picture 'none/x.png'"),
    ],
)
def test_show_refuses(run, vectors, arguments, message):
    code, out, err = run("vectors", "show", *arguments)
    assert (code, out) == (1, "")
    assert one_line(err).startswith("steermoe: ")
    assert message in err


# ---- check ----


def test_check(run, vectors):
    code, out, err = run("vectors", "check", "sport", vectors / "tiny-mixtral" / "food.safetensors")
    sport, food = out.splitlines()
    assert (code, err) == (0, "")
    told = "numbers and hash are right, the hash covers numbers and settings"
    assert sport.endswith(f"sport.safetensors: 'sport', 3 x 8, {told}")
    assert "'food'" in food


def test_check_tells_of_each_bad_file(run, vectors):
    bad = vectors / "bad.safetensors"
    good = (vectors / "tiny-mixtral" / "food.safetensors").read_bytes()
    bad.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    code, out, err = run("vectors", "check", "nope", bad, "sport")
    assert code == 1
    assert out.count("\n") == 1
    assert "'sport'" in out
    missing, tampered = err.splitlines()
    assert missing.startswith("steermoe: no vector 'nope'")
    assert tampered.startswith(f"steermoe: '{bad}': its numbers do not match the hash")


def test_check_json(run, vectors):
    code, out, err = run("vectors", "check", "sport", "nope", "--json")
    record = json.loads(out)
    assert (code, err) == (1, "")
    assert (record["ok"], record["model"]) == (False, None)
    sport, nope = record["files"]
    assert (sport["domain"], sport["layers"], sport["num_experts"], sport["error"]) == ("sport", [0, 1, 2], 8, None)
    assert nope["error"].startswith("no vector 'nope'")
    assert set(sport) == set(nope)
    assert json.loads(run("vectors", "check", "sport", "--json").out)["ok"] is True


def test_check_says_what_an_old_hash_covers_and_adds_the_new_one(run, vectors, bare_search_path):
    path = vectors / "tiny-mixtral" / "sport.safetensors"
    before = read_vector(path)
    as_version_1(path)
    code, out, err = run("vectors", "check", "sport")
    assert (code, err) == (0, "")
    assert "the hash covers the numbers alone (--rehash adds strength, layers and all other settings)" in out
    assert json.loads(run("vectors", "check", "sport", "--json").out)["files"][0]["covers"] == "numbers"
    assert run("vectors", "check", "sport", "--rehash").out.endswith("the hash covers numbers and settings\n")
    assert json.loads(run("vectors", "check", "sport", "--json").out)["files"][0]["covers"] == "all"
    after = read_vector(path)
    assert torch.equal(before.frequency, after.frequency)
    assert (before.info, before.layers, before.threshold) == (after.info, after.layers, after.threshold)


@pytest.mark.parametrize(
    ("field", "value"),
    [("strength", 40.0), ("strength", -4.0), ("safe_range", [0.0, 60.0]), ("formula", "additive"), ("model", "other")],
)
def test_check_and_use_refuse_an_edited_header(run, vectors, field, value):
    path = vectors / "tiny-mixtral" / "sport.safetensors"
    edit_header(path, lambda header: header["info"].update({field: value}))
    for arguments in (["check", "sport"], ["show", "sport"]):
        code, out, err = run("vectors", *arguments)
        assert (code, out) == (1, "")
        assert "its header (strength, layers, threshold ...) does not match the hash" in one_line(err)
    code, out, err = run("vectors", "list")
    assert code == 0
    assert "food" in out
    assert "skipped" in one_line(err)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.update(layers=[0, 1, 100_000_000]),
        lambda header: header["info"].update(strength=10**400),
        lambda header: header["info"].update(damage=10**400),
        lambda header: header["info"].update(safe_range=[0, 10**400]),
        lambda header: header["info"].update(texts=10**400),
        lambda header: header.update(num_experts=10**400),
        lambda header: header.update(format_version=10**400),
    ],
    ids=["layers", "strength", "damage", "safe range", "texts", "experts", "version"],
)
def test_no_number_of_a_bad_file_ends_the_list(run, vectors, change):
    """Whether its hash is right or not."""
    path = vectors / "tiny-mixtral" / "sport.safetensors"
    for is_rehashed in (False, True):
        edit_header(path, change, rehash=is_rehashed)
        code, out, err = run("vectors", "list", "--json")
        assert code == 0
        assert [record["domain"] for record in json.loads(out)] == ["food"]
        assert "skipped" in one_line(err)
        assert len(err) < 1000


def test_check_against_a_model(run, vectors, make_vector, tiny_checkpoint):
    code, out, err = run("vectors", "check", "sport", "--model", tiny_checkpoint)
    assert (code, err) == (0, "")
    assert out.endswith("right, the hash covers numbers and settings, fits tiny-mixtral\n")
    write_vector(make_vector("law", layers=range(4)), vectors / "law.safetensors")
    code, out, err = run("vectors", "check", "law", "--model", tiny_checkpoint)
    assert (code, out) == (1, "")
    assert "vector 'law' has 4x8 experts, tiny-mixtral has 3x8" in one_line(err)


def test_check_takes_the_file_that_fits_the_model(run, vectors, make_vector, tiny_checkpoint):
    write_vector(make_vector("sport", layers=range(4)), vectors / "sport.safetensors")
    record = json.loads(run("vectors", "check", "sport", "--model", tiny_checkpoint, "--json").out)
    assert record["model"] == "tiny-mixtral"
    assert record["files"][0]["path"] == str(vectors / "tiny-mixtral" / "sport.safetensors")


def test_check_against_no_model(run, vectors):
    code, out, err = run("vectors", "check", "sport", "--model", "./none")
    assert (code, out) == (1, "")
    assert "no model at './none'" in one_line(err)


# ---- import ----


def test_import(run, matrix):
    code, out, err = run("vectors", "import", matrix, "--domain", "chess")
    assert (code, err) == (0, "")
    assert out == "steering_vectors/imported/chess.safetensors\n"
    vector = read_vector(Path(out.strip()))
    assert vector.chosen() == {layer: {1: 0.5} for layer in range(3)}
    assert "chess" in run("vectors", "list").out  # it is where vectors are searched


def test_import_for_a_model(run, matrix, tiny_checkpoint):
    code, out, err = run("vectors", "import", matrix, "-d", "chess", "-m", tiny_checkpoint, "--json")
    record = json.loads(out)
    assert (code, err) == (0, "")
    assert record["path"] == "steering_vectors/tiny-mixtral/chess.safetensors"
    assert (record["model"], record["architecture"], record["top_k"]) == ("tiny-mixtral", "mixtral", 2)
    assert record["created_by"] == "steermoe vectors import"


def test_import_of_one_of_several_flat_vectors(run, matrix, tiny_checkpoint):
    flat = [0.0] * 24
    flat[9] = 0.5
    Path("clusters.json").write_text(json.dumps({"0": {"embedding": [1.0] * 24}, "12": {"embedding": flat}}))
    arguments = ["vectors", "import", "clusters.json", "-d", "chess", "-m", tiny_checkpoint]
    assert "there are '0', '12': pass --cluster" in one_line(run(*arguments).err)
    assert run(*arguments, "--cluster", "12").code == 0
    vector = read_vector(Path("steering_vectors/tiny-mixtral/chess.safetensors"))
    assert vector.chosen() == {0: {}, 1: {1: 0.5}, 2: {}}


def test_import_refuses_to_overwrite(run, matrix):
    output = ["vectors", "import", matrix, "-d", "chess", "-o", "mine.safetensors"]
    assert run(*output).code == 0
    before = Path("mine.safetensors").stat().st_mtime_ns
    code, out, err = run(*output)
    assert (code, out) == (1, "")
    assert "'mine.safetensors' already exists: pass --force" in one_line(err)
    assert Path("mine.safetensors").stat().st_mtime_ns == before
    assert run(*output, "--force").code == 0
    assert Path("mine.safetensors").stat().st_mtime_ns != before


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("[[1, 2", [], "is not JSON"),
        ("[[1, 2]]", ["-d", "../chess"], "domain name '../chess' is not allowed"),
        ("[[1, 2]]", ["-o", f"{'x' * 300}.safetensors"], "File name too long"),
        ("[[1, 2]]", ["-o", "chess.json"], "'chess.json' is not the name of a vector file: end it in .safetensors"),
        ("[[1, 2]]", ["-m", "TINY"], "has 1 rows, expected one for each of 3 layers"),
        ("[[1, 2], [1, 2], [1, 2]]", ["-m", "TINY"], "has 3x2 experts, tiny-mixtral has 3x8: it was built for another"),
        (f"[{', '.join([str([1] * 9)] * 3)}]", ["-m", "TINY"], "vector 'chess' has 3x9 experts, tiny-mixtral has 3x8"),
    ],
)
def test_import_refuses(run, matrix, tiny_checkpoint, content, options, message):
    matrix.write_text(content)
    options = [str(tiny_checkpoint) if option == "TINY" else option for option in options]
    code, out, err = run("vectors", "import", matrix, "-d", "chess", *options)
    assert (code, out) == (1, "")
    assert message in one_line(err)
    assert not list(Path.cwd().rglob("*.safetensors"))


# ---- the group ----


@pytest.mark.parametrize(
    "arguments",
    [
        ["vectors", "nope"],
        ["vectors", "show"],
        ["vectors", "check"],
        ["vectors", "import", "m.json"],
        ["vectors", "list", "--nope"],
    ],
)
def test_wrong_usage(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("steermoe: ")
    assert err.endswith(" --help`)\n")
    assert err.count("\n") == 1
    assert " vectors " in err


@pytest.mark.parametrize("command", ["list", "show", "check", "import"])
def test_help_ends_with_examples_of_the_command(run, command):
    code, out, _ = run("vectors", command, "--help")
    examples = out.split("Examples:")[1].split("\n\n")
    assert code == 0
    assert len([line for line in examples if line.strip()]) >= 2
    assert all(line.strip().startswith(f"steermoe vectors {command}") for line in examples if line.strip())


@pytest.mark.parametrize(("no_color", "has_colour"), [(None, True), ("1", False)])
def test_no_color(vectors, no_color, has_colour):
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "80"}
    environment.pop("NO_COLOR", None)
    if no_color:
        environment["NO_COLOR"] = no_color
    command = [sys.executable, "-m", "steermoe.cli.app", "vectors", "show", "sport"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert ("\x1b[31m" in done.stdout) == has_colour
    assert "██" in done.stdout
    assert done.stderr == ""
