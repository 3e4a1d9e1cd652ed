"""Packs on a stand-in for the Hub: places, what is checked of a file, the cache, pulling, and vectors from Python."""

import json
import struct
import threading
from dataclasses import replace

import pytest
import torch
from huggingface_hub import constants

from steermoe.errors import CompatibilityError, HubError, HubUnreachable, VectorError, VectorNotFound
from steermoe.vectors import hub as hubs
from steermoe.vectors.file import read_header, read_vector, write_vector
from steermoe.vectors.hub import Place, fetch, find, open_pack, parse_place, pull
from steermoe.vectors.library import find_vector, is_path, load_vector
from steermoe.vectors.vector import SteeringVector

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def content(make_vector, tmp_path):
    """The bytes of a vector's file."""

    def make(domain="sport", **fields) -> bytes:
        write_vector(make_vector(domain, **fields), tmp_path / "made.safetensors")
        return (tmp_path / "made.safetensors").read_bytes()

    return make


@pytest.fixture
def pack(hub, content):
    """`you/pack`, with sport and food."""
    return hub.add("you/pack", {"sport.safetensors": content(), "food.safetensors": content("food")})


@pytest.fixture
def go_offline(monkeypatch):
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


# ---- places ----


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("hub:you/pack/sport", Place("you/pack", "sport")),
        ("hub:you/my.pack_2/a-b@v1.0", Place("you/my.pack_2", "a-b", "v1.0")),
        ("hub:you/pack/спорт@refs/pr/3", Place("you/pack", "спорт", "refs/pr/3")),
        (f"hub:you/pack/sport@{COMMIT}", Place("you/pack", "sport", COMMIT)),
    ],
)
def test_places(text, place):
    assert parse_place(text) == place
    assert str(place) == text
    assert not is_path(text)


@pytest.mark.parametrize(
    "text",
    [
        *("hub:", "hub:sport", "hub:you/pack", "hub:/pack/sport", "hub:you//sport", "hub:you/pack/", "hub:a/b/c/sport"),
        *(
            "hub:../pack/sport",
            "hub:you/../sport",
            "hub:you/a--b/sport",
            "hub:you/pack.git/sport",
            "hub:-you/pack/sport",
        ),
        *("hub:you/pack/../sport", "hub:you/pack/Sport", "hub:you/pack/sport.safetensors", "hub:you/pack/a\nb"),
        *("hub:you/pack/sport@", "hub:you/pack/sport@../x", "hub:you/pack/sport@-x", "hub:you/pack/sport@a b"),
        *(
            f"hub:{'y' * 97}/pack/sport",
            "hub:you/pack/sport@" + "x" * 101,
            "hub:you/pack/sport@v1@v2",
            "hub:yöu/pack/sport",
        ),
    ],
)
def test_what_is_no_place(hub, text):
    with pytest.raises(VectorError) as error:
        find_vector(text)
    assert "\n" not in str(error.value)
    assert hub.requests == []


# ---- one vector ----


def test_a_domain_is_taken_by_its_place(pack, caplog):
    (path,) = find_vector("hub:you/pack/sport")
    assert read_header(path).domain == "sport"
    assert path.parent.name == pack.names["main"]
    (note,) = caplog.messages
    assert note == f"hub:you/pack/sport is now hub:you/pack/sport@{pack.names['main']}, which stays what it is"


def test_one_process_stays_with_one_revision(pack, content, caplog):
    (before,) = find_vector("hub:you/pack/sport")
    pack.commit({"sport.safetensors": content(threshold=1.5)})
    assert find_vector("hub:you/pack/sport") == [before]
    assert len(caplog.messages) == 1


def test_revisions(hub, pack, content):
    old = pack.names["main"]
    pack.names["v1"] = old
    pack.commit({"sport.safetensors": content(threshold=1.5)})
    thresholds = {name: read_header(find(f"hub:you/pack/sport{name}")).threshold for name in ("", "@v1", f"@{old}")}
    assert thresholds == {"": 1.5, "@v1": 3.0, f"@{old}": 3.0}
    hub.requests.clear()
    find(f"hub:you/pack/sport@{old}")  # a commit that is in the cache can't have changed
    assert hub.requests == []
    with pytest.raises(HubError, match="'you/pack' has no revision 'v2'"):
        find("hub:you/pack/sport@v2")


def test_what_is_not_there(hub, pack):
    hub.add("you/secret", private=True)
    with pytest.raises(VectorNotFound, match=r"'you/pack' has no vector 'law' at \w{12}; it has food, sport"):
        find("hub:you/pack/law")
    for name in ("you/nothing", "you/secret"):
        with pytest.raises(HubError, match=f"the Hub has no '{name}', or it is private: check the name, or log in"):
            open_pack(name, token=False)


def test_a_gated_pack(hub, content):
    hub.add("you/gated", {"sport.safetensors": content()}, gated=True)
    with pytest.raises(HubError, match="'you/gated' is gated: ask for access"):
        find("hub:you/gated/sport")


def test_a_private_pack_needs_its_token(hub, content):
    hub.add("me/secret", {"sport.safetensors": content()}, private=True)
    assert find("hub:me/secret/sport").is_file()
    with pytest.raises(HubError, match=r"refuses that for 'me/secret' \(401\): log in"):
        open_pack("me/secret", token="hf_wrong")


def test_another_model_is_refused_without_the_switch(pack, tiny_model, make_vector, content):
    foreign = make_vector(info=replace(make_vector().info, model="other", fingerprint="0" * 16))
    pack.commit({"sport.safetensors": content(info=foreign.info)})
    with pytest.raises(CompatibilityError, match="was built for other, and tiny-mixtral has none of its own"):
        load_vector("hub:you/pack/sport", tiny_model.shape)
    assert load_vector("hub:you/pack/sport", tiny_model.shape, any_model=True).info.model == "other"
    pack.commit({"law.safetensors": content("law", layers=range(2))})
    with pytest.raises(CompatibilityError, match="2x8 experts, tiny-mixtral has 3x8"):
        load_vector("hub:you/pack/law", tiny_model.shape, any_model=True)


# ---- hostile files ----


def test_content_that_is_not_what_the_hub_lists(hub, pack):
    hub.on_content = lambda sent: sent[:-1] + bytes([sent[-1] ^ 1])
    with pytest.raises(VectorError, match="is not the file that the Hub lists in 'you/pack': it was damaged"):
        find("hub:you/pack/sport")


def test_a_file_in_git_itself_is_compared_too(hub, pack):
    def in_git(listing):
        for one in listing["siblings"]:
            one.pop("lfs", None)
        return listing

    hub.on_listing = in_git  # the sha1 is now of the pointer, not of the content
    with pytest.raises(VectorError, match="is not the file that the Hub lists"):
        find("hub:you/pack/sport")


def test_numbers_that_do_not_match_their_hash(hub, content):
    good = content()
    hub.add("you/bad", {"sport.safetensors": good[:-1] + bytes([good[-1] ^ 1])})
    with pytest.raises(VectorError, match="its numbers do not match the hash in its header"):
        load_vector("hub:you/bad/sport")


def test_too_large_is_not_downloaded(hub, pack, monkeypatch):
    monkeypatch.setattr(hubs, "MAX_FILE_BYTES", 100)
    with pytest.raises(VectorError, match="a vector file at most 100: it is something else, and was not downloaded"):
        find("hub:you/pack/sport")
    assert not [one for one in hub.requests if "/resolve/" in one or "/cdn/" in one]


def test_a_size_that_is_a_lie(hub, pack):
    def small(listing):
        for one in listing["siblings"]:
            one["size"] = 10
        return listing

    hub.on_listing = small
    with pytest.raises(VectorError, match="is not the file that the Hub lists"):
        find("hub:you/pack/sport")


@pytest.mark.parametrize(
    "changed", [{"sha": "../../etc"}, {"sha": None}, {"siblings": "none"}, {"siblings": [{"x": 1}]}]
)
def test_an_answer_that_is_no_hub_s(hub, pack, changed):
    hub.on_listing = lambda listing: {**listing, **changed}
    with pytest.raises(HubError):
        find("hub:you/pack/sport")


@pytest.mark.parametrize("key", ["self", "ignore_metadata_errors"])
def test_a_card_is_not_read_to_pull(hub, content, bare_search_path, key):
    """huggingface_hub's own reading of a listing stumbles over such keys."""
    hub.add("you/pack", {"sport.safetensors": content(), "README.md": f"---\n{key}: 1\n---\n".encode()})
    (path,) = pull(open_pack("you/pack"))
    assert path.name == "sport.safetensors"


def test_names_that_would_leave_the_folder(hub, pack, content, bare_search_path):
    evil = (
        "../evil.safetensors",
        "/evil.safetensors",
        "a/evil.safetensors",
        ".safetensors",
        "Evil.safetensors",
        "a b.safetensors",
    )
    hub.on_listing = lambda listing: {
        **listing,
        "siblings": [*listing["siblings"], *({"rfilename": name, "size": 1, "blobId": "0" * 40} for name in evil)],
    }
    found = open_pack("you/pack")
    assert set(found.files) == {"sport", "food"}
    assert set(found.others) == set(evil)
    written = pull(found)
    assert {path.as_posix() for path in written} == {
        f"steering_vectors/tiny-mixtral/{name}.safetensors" for name in ("food", "sport")
    }


@pytest.mark.parametrize("model", ["../../evil", "..", "/", "a/../..", "x" * 300, "\U0001f600" * 80, "a\nb", ""])
def test_a_model_s_name_stays_in_the_folder(hub, content, make_vector, bare_search_path, model):
    hub.add("you/pack", {"sport.safetensors": content(info=replace(make_vector().info, model=model))})
    (path,) = pull(open_pack("you/pack"))
    inside = (bare_search_path / "steering_vectors").resolve()
    assert path.resolve().parent.parent == inside
    assert [one.name for one in bare_search_path.iterdir()] == ["steering_vectors"]


def test_a_renamed_vector(hub, content):
    hub.add("you/pack", {"sport.safetensors": content("food")})
    with pytest.raises(VectorError, match=r"'sport.safetensors' of 'you/pack' holds a vector that is called 'food'"):
        find("hub:you/pack/sport")


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", struct.pack("<Q", 2) + b"{}"])
def test_what_is_no_vector_is_not_read_further(hub, content):
    hub.add("you/pack", {"sport.safetensors": content})
    with pytest.raises(VectorError, match=r"sport\.safetensors'"):
        find("hub:you/pack/sport")


def test_a_pack_that_changes_while_it_is_read(hub, pack, content):
    found = open_pack("you/pack")
    pack.commit({"sport.safetensors": content(threshold=1.5)})
    with pytest.raises(HubError, match="'you/pack' was changed while it was read: run the same command again"):
        fetch(found, "sport")


# ---- the cache ----


def test_without_a_network_the_copy_is_taken(pack, go_offline, caplog, monkeypatch):
    path = find("hub:you/pack/sport")
    monkeypatch.setattr(hubs, "_found", {})
    go_offline()
    caplog.clear()
    assert find("hub:you/pack/sport") == path
    (note,) = caplog.messages
    assert note.endswith(f"using what was pulled before, hub:you/pack/sport@{pack.names['main']}")
    with pytest.raises(VectorNotFound, match=r"'you/pack' has no vector 'food' at \w{12}; it has sport"):
        find("hub:you/pack/food")
    with pytest.raises(
        HubUnreachable, match=r"HF_HUB_OFFLINE is set.*nothing of 'you/other' at revision 'main' was pulled"
    ):
        find("hub:you/other/food")


def test_a_hub_that_is_away(hub, pack, monkeypatch):
    path = find("hub:you/pack/sport")
    monkeypatch.setattr(hubs, "_found", {})
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert find("hub:you/pack/sport") == path
    with pytest.raises(
        HubUnreachable, match=r"can't reach the Hub at http://127.0.0.1:9 .*nothing of 'you/new'"
    ) as error:
        find("hub:you/new/sport")
    assert "\n" not in str(error.value)


def test_a_hub_that_answers_and_then_is_away(pack, monkeypatch):
    path = find("hub:you/pack/sport")
    monkeypatch.setattr(hubs, "_found", {})

    def away(*arguments, **named):
        raise HubUnreachable("can't reach the Hub")

    monkeypatch.setattr("steermoe.vectors.hub.listing", away)
    assert find("hub:you/pack/sport") == path
    with pytest.raises(HubUnreachable, match="nothing of 'you/new'"):
        find("hub:you/new/sport")


def test_a_damaged_copy_is_noticed_offline(pack, go_offline, monkeypatch):
    path = find("hub:you/pack/sport")
    blob = path.resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x7f")
    monkeypatch.setattr(hubs, "_found", {})
    go_offline()
    with pytest.raises(VectorError, match="do not match the hash"):
        load_vector("hub:you/pack/sport")


# ---- pulling ----


def test_pulling_keeps_the_source(pack, bare_search_path, make_vector):
    written = pull(open_pack("you/pack"), ["sport"])
    (path,) = written
    vector = read_vector(path)
    assert vector.info.source == f"hub:you/pack/sport@{pack.names['main']}"
    assert torch.equal(vector.experts, make_vector().experts)
    assert load_vector("sport").info == vector.info
    assert written[path].info == vector.info


def test_nothing_is_written_unless_all_is_right(hub, pack, bare_search_path, content):
    pull(open_pack("you/pack"), ["sport"])
    with pytest.raises(VectorError, match=r"sport.safetensors' already exists: pass --force"):
        pull(open_pack("you/pack"))
    pack.commit({**pack.files, "law.safetensors": b"nothing"})
    with pytest.raises(VectorError):
        pull(open_pack("you/pack"), overwrite=True)
    assert [path.name for path in bare_search_path.rglob("*.safetensors")] == ["sport.safetensors"]
    hub.add("you/empty")
    with pytest.raises(VectorNotFound, match=r"needs files DOMAIN\.safetensors outside of all folders"):
        pull(open_pack("you/empty"))


def test_two_pulls_at_once(pack, bare_search_path):
    failed = []

    def run(number):
        try:
            pull(open_pack("you/pack"), folder=bare_search_path / str(number))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(list(bare_search_path.rglob("*.safetensors"))) == 8


# ---- from Python ----


def test_from_pretrained(hub, pack, content, make_vector):
    vector = SteeringVector.from_pretrained("you/pack", "sport")
    assert (vector.domain, vector.info.source) == ("sport", f"hub:you/pack/sport@{pack.names['main']}")
    assert SteeringVector.from_pretrained("hub:you/pack/food").domain == "food"
    with pytest.raises(VectorNotFound, match="'you/pack' has 2 vectors: name a domain, one of food, sport"):
        SteeringVector.from_pretrained("you/pack")
    hub.add("you/single", {"law.safetensors": content("law")})
    assert SteeringVector.from_pretrained("you/single").domain == "law"
    old = pack.names["main"]
    pack.commit({"sport.safetensors": content(threshold=1.5)})
    assert SteeringVector.from_pretrained("you/pack", "sport", revision=old).threshold == 3
    assert SteeringVector.from_pretrained("you/pack", "sport").threshold == 1.5


def test_the_file_says_nothing_of_a_source_if_there_is_none(tmp_path, make_vector):
    write_vector(make_vector(), tmp_path / "sport.safetensors")
    raw = (tmp_path / "sport.safetensors").read_bytes()
    header = json.loads(json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])["__metadata__"]["steermoe"])
    assert "source" not in header["info"]
