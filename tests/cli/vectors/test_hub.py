"""`steermoe vectors push`, `pull` and `search`, and `-d hub:...`, on a stand-in for the Hub."""

import json
import re
import time
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants, hf_hub_download

from steermoe.errors import HubUnreachable
from steermoe.models import checkpoint
from steermoe.models.checkpoint import _locate
from steermoe.models.description import describe
from steermoe.steering.resolver import PlanResolver
from steermoe.steering.spec import SteeringSpec
from steermoe.vectors.file import read_header, read_vector, write_vector
from steermoe.vectors.pushing import Push, preview
from steermoe.vectors.vector import SteeringVector, VectorInfo
from tests.conftest import TOP_K
from tests.support.hub import Answer

pytest.importorskip("matplotlib")

PNG = b"\x89PNG\r\n"
INFO = VectorInfo(
    title="Sport | <b>games</b>",
    keywords=("team", "goal"),
    model="acme/Tiny-Mixtral",
    architecture="mixtral",
    fingerprint="0123456789abcdef",
    top_k=TOP_K,
    formula="max_scaled",
    strength=4.0,
    safe_range=(0.0, 8.0),
    damage=0.75,
    texts=12,
    tokens=3400,
    licence="Apache-2.0",
    created_by="a test",
)


@pytest.fixture
def vectors(hub, bare_search_path, make_vector):
    """`sport` and `food` of one model in ./steering_vectors, and the stand-in."""
    for domain in ("sport", "food"):
        write_vector(
            make_vector(domain, info=INFO), bare_search_path / "steering_vectors" / "tiny" / f"{domain}.safetensors"
        )
    return bare_search_path


def front_matter(card: bytes | str) -> dict:
    text = card.decode() if isinstance(card, bytes) else card
    return yaml.safe_load(text.split("---\n")[1])


# ---- push ----


def test_a_push_makes_a_repository_with_card_and_map(hub, vectors, run):
    done = run("vectors", "push", "sport", "--to", "me/pack")
    repo = hub.repos["me/pack"]
    assert done.code == 0, done.err
    assert (done.code, done.out) == (0, f"{hub.address}/me/pack/commit/{repo.names['main']}\n")
    assert done.err == "use it with -d hub:me/pack/sport\n"
    assert set(repo.files) == {".gitattributes", "README.md", "sport.png", "sport.safetensors"}
    assert repo.files["sport.png"].startswith(PNG)
    assert len(repo.commits) == 2
    card = repo.files["README.md"].decode()
    known = front_matter(card)
    assert known.pop("steermoe") == {
        "model": "acme/Tiny-Mixtral",
        "fingerprint": "0123456789abcdef",
        "vectors": [
            {
                "domain": "sport",
                "sha256": read_header(vectors / "steering_vectors/tiny/sport.safetensors").sha256,
                "keywords": ["team", "goal"],
            }
        ],
    }
    assert known == {
        "library_name": "steermoe",
        "base_model": "acme/Tiny-Mixtral",
        "base_model_relation": "adapter",
        "license": "apache-2.0",
        "tags": ["steermoe", "steermoe-vector", "steering-vector", "mixture-of-experts"],
    }
    assert "| sport | 4 | 0 to 8 | 0.75 nats | not measured | not measured | 12 | Apache-2.0 |" in card
    assert "steermoe generate --model acme/Tiny-Mixtral -d hub:me/pack/sport\n" in card
    assert "![Map of sport: layers and experts](sport.png)" in card
    assert "- about: Sport \\| &lt;b\\>games&lt;/b\\>" in card


def test_what_is_there_stays(hub, vectors, run):
    run("vectors", "push", "sport", "--to", "me/pack")
    repo = hub.repos["me/pack"]
    before = repo.files["README.md"].decode()
    mine = before.replace("license: apache-2.0", "license: mit\nlanguage: en").replace(
        "- steermoe\n", "- steermoe\n- football\n"
    )
    repo.commit({**repo.files, "README.md": f"{mine}\nMy own words.\n".encode(), "notes.txt": b"notes"})
    done = run("vectors", "push", "food", "--to", "me/pack", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == {
        "repo": "me/pack",
        "revision": repo.names["main"],
        "url": f"{hub.address}/me/pack/commit/{repo.names['main']}",
        "domains": ["food", "sport"],
        "base_model": "acme/Tiny-Mixtral",
    }
    card = repo.files["README.md"].decode()
    assert {"notes.txt", "sport.safetensors", "food.safetensors", "sport.png", "food.png"} < set(repo.files)
    assert card.count("My own words.") == 1
    assert card.count("## What was measured") == 1
    assert "| food | 4 |" in card
    assert "| sport | 4 |" in card
    assert (front_matter(card)["language"], front_matter(card)["license"]) == ("en", "mit")
    assert "football" in front_matter(card)["tags"]
    assert [one["domain"] for one in front_matter(card)["steermoe"]["vectors"]] == ["food", "sport"]
    commits = len(repo.commits)
    assert run("vectors", "push", "food", "--to", "me/pack").code == 0
    assert len(repo.commits) == commits  # nothing has changed


def test_success_is_on_the_card_if_it_was_measured(hub, vectors, run, tmp_path, make_vector):
    evaluation = write_evaluation(tmp_path / "evaluation", make_vector(info=INFO))
    done = run("vectors", "push", "sport", "--to", "me/pack", "--evaluation", evaluation)
    assert done.code == 0, done.err
    card = hub.repos["me/pack"].files["README.md"].decode()
    assert "| sport | 4 | 0 to 8 | 0.75 nats | 72% (65% to 79%) of 150 texts | 3% | 12 |" in card
    assert run("vectors", "push", "food", "--to", "me/pack").code == 0
    assert "72% (65% to 79%) of 150 texts" in hub.repos["me/pack"].files["README.md"].decode()
    for changed in ({"strength": 5.0}, {"kind": "shuffled"}, {"formula": "additive"}):
        other = write_evaluation(tmp_path / "other", make_vector(info=INFO), **changed)
        done = run("vectors", "push", "sport", "--to", "me/pack", "--evaluation", other)
        assert (done.code, done.err.count("\n")) == (1, 1)
        assert "has no success of sport at the vector's own strength: run `steermoe evaluate -d sport" in done.err
    foreign = write_evaluation(tmp_path / "foreign", make_vector(info=INFO, threshold=0.1))
    done = run("vectors", "push", "sport", "--to", "me/pack", "--evaluation", foreign)
    assert "is about another vector 'sport': evaluate the one that you push" in done.err
    (evaluation / "evaluation.json").write_text("[]")
    assert "is damaged" in run("vectors", "push", "sport", "--to", "me/pack", "--evaluation", evaluation).err
    assert "can't read" in run("vectors", "push", "sport", "--to", "me/pack", "--evaluation", tmp_path).err


def write_evaluation(folder, vector, **changed):
    """What `steermoe evaluate` writes of one vector, as far as it is read here."""
    from steermoe.vectors.file import tensors_sha256

    folder.mkdir(exist_ok=True)
    share = {"mean": 0.72, "low": 0.65, "high": 0.79, "openings": 50}
    row = {
        "kind": "steered",
        "domain": "sport",
        "formula": "max_scaled",
        "scale": "magnitude",
        "cut": "own",
        "strength": 4.0,
    }
    digest = tensors_sha256({"experts": vector.experts.contiguous()})[:16]
    settings = {"openings": ["It rained."] * 50, "seeds": 3}
    summary = {
        "settings": settings,
        "unsteered": {"sport": {"sound_success": {**share, "mean": 0.03}}},
        "conditions": [{**row, **changed, "figures": {"sound_success": share}}],
    }
    (folder / "settings.json").write_text(json.dumps({**settings, "vectors": {"sport": digest}}))
    (folder / "evaluation.json").write_text(json.dumps(summary))
    return folder


def test_a_dry_run_asks_nobody(hub, vectors, run):
    done = run(
        "vectors",
        "push",
        "sport",
        "food",
        "--to",
        "me/pack",
        "--licence",
        "CC-BY-4.0",
        "--base-model",
        "acme/base",
        "--dry-run",
    )
    assert done.code == 0, done.err
    known = front_matter(done.out)
    assert (known["license"], known["base_model"]) == ("cc-by-4.0", "acme/base")
    assert "--model acme/base -d hub:me/pack/food" in done.out
    assert hub.requests == []


def write_second(folder, make_vector, **changed):
    """`./art.safetensors`, whose header differs."""
    write_vector(make_vector("art", info=VectorInfo(**{**INFO.__dict__, **changed})), folder / "art.safetensors")


def test_a_licence_in_words_is_replaced(hub, vectors, make_vector, run):
    write_second(vectors, make_vector, licence="MIT License")
    push = ("vectors", "push", "./art.safetensors", "--to", "me/pack")
    done = run(*push)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "licence 'MIT License' is none that the Hub knows: name one with --licence" in done.err
    assert hub.repos == {}  # nothing is created for it
    assert front_matter(run(*push, "--licence", "apache-2.0", "--dry-run").out)["license"] == "apache-2.0"
    repo = hub.add("me/pack", {"README.md": b"---\nlicense: mit\n---\n"})
    done = run(*push)
    assert done.code == 0, done.err
    assert front_matter(repo.files["README.md"])["license"] == "mit"


def test_a_licence_that_not_all_vectors_name(hub, vectors, make_vector, run):
    write_second(vectors, make_vector, licence="")
    push = ("vectors", "push", "sport", "./art.safetensors", "--to", "me/pack", "--dry-run")
    done = run(*push)
    assert done.code == 0, done.err
    assert "license" not in front_matter(done.out)
    assert front_matter(run(*push, "--licence", "mit").out)["license"] == "mit"


@pytest.mark.parametrize("model", ["./my-model", "../x", "models/mine", "here/mine", "acme/x.git", "/data/x", "a/b/c"])
def test_a_model_in_a_folder_is_no_base_model(hub, vectors, make_vector, run, model):
    (vectors / "here" / "mine").mkdir(parents=True)
    write_second(vectors, make_vector, model=model)
    done = run("vectors", "push", "./art.safetensors", "--to", "me/pack")
    assert done.code == 0, done.err
    assert "base_model" not in front_matter(hub.repos["me/pack"].files["README.md"])
    assert "the card names no base model, so nobody finds the pack by it: pass --base-model" in done.err


def test_a_card_that_is_too_large_is_not_downloaded(hub, vectors, run, monkeypatch):
    monkeypatch.setattr("steermoe.vectors.pushing.MOST_CARD_BYTES", 10)
    hub.add("me/pack", {"README.md": b"x" * 11})
    done = run("vectors", "push", "sport", "--to", "me/pack")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "the README.md of 'me/pack' is no card (it has more than 10 bytes): mend it" in done.err
    assert not [one for one in hub.requests if "/resolve/" in one]


def test_nothing_is_pushed_onto_a_copy(hub, vectors, run, monkeypatch):
    run("vectors", "push", "sport", "--to", "me/pack")
    repo = hub.repos["me/pack"]
    run("vectors", "pull", "me/pack", "-o", "there")
    before = dict(repo.commits)

    def away(*arguments, **named):
        raise HubUnreachable("can't reach the Hub")

    monkeypatch.setattr("steermoe.vectors.hub.listing", away)
    monkeypatch.setattr("steermoe.vectors.pushing.is_there", lambda *arguments: True)
    done = run("vectors", "push", "food", "--to", "me/pack")
    assert (done.code, done.err) == (1, "steermoe: can't reach the Hub\n")
    assert repo.commits == before


def test_a_vector_of_another_pack_says_where_it_is_from(shared, run):
    done = run("vectors", "push", "hub:you/pack/sport", "--to", "me/pack", "--dry-run")
    assert done.code == 0, done.err
    assert f"- pulled from: hub:you/pack/sport@{shared.names['main']}\n" in done.out


def test_the_default_model_s_card(hub, bare_search_path, make_vector, run):
    info = VectorInfo(model="smollm2-moe", licence="Apache-2.0")
    write_vector(make_vector(info=info), bare_search_path / "sport.safetensors")
    card = run("vectors", "push", "./sport.safetensors", "--to", "me/pack", "--dry-run").out
    assert front_matter(card)["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "steermoe generate -d hub:me/pack/sport\n" in card
    assert "`steermoe models pull` makes the model" in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sport", "--to", "you/pack"], r"the Hub refuses that for 'you/pack' (403): log in"),
        (["sport", "--to", "pack"], "'pack' is no repository of the Hub: write USER/REPO"),
        (["sport", "--to", "me/../x"], "'me/../x' is no repository of the Hub: write USER/REPO"),
        (["law", "--to", "me/pack"], "no vector 'law'"),
        (["sport", "--to", "me/pack", "--licence", "my own"], "licence 'my own' is none that the Hub knows"),
        (["sport", "--to", "me/pack", "--licence", "wtf-1.0"], "'me/pack': Invalid metadata in README.md."),
        (["sport", "--to", "me/pack", "--base-model", "../x"], "'../x' is no repository of the Hub"),
        (
            ["sport", "./steering_vectors/tiny/sport.safetensors", "--to", "me/pack"],
            "two of the vectors are called 'sport'",
        ),
        (
            ["sport", "./other.safetensors", "--to", "me/pack"],
            "vector 'law' is for 'acme/other', the others for 'acme/Tiny-Mixtral' (3x8, routers 0123456789abcdef)",
        ),
        (
            ["sport", "./mit.safetensors", "--to", "me/pack"],
            "the vectors have several licences (apache-2.0, mit): name one",
        ),
        (["./mixed.safetensors", "--to", "me/pack"], "domain name 'a+b' is not allowed"),
    ],
)
def test_pushes_that_are_refused(hub, vectors, make_vector, run, arguments, message):
    changes = {"other": ("law", {"model": "acme/other"}), "mit": ("art", {"licence": "MIT"}), "mixed": ("a+b", {})}
    for name, (domain, changed) in changes.items():
        info = VectorInfo(**{**INFO.__dict__, **changed})
        write_vector(make_vector(domain, info=info), vectors / f"{name}.safetensors")
    done = run("vectors", "push", *arguments)
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert message in done.err


def test_a_pack_of_another_model(hub, vectors, make_vector, run, tmp_path):
    write_vector(make_vector(info=VectorInfo(model="acme/other")), tmp_path / "x.safetensors")
    hub.add("me/pack", {"law.safetensors": b"damaged"})
    assert "law.safetensors' is not a safetensors file" in run("vectors", "push", "sport", "--to", "me/pack").err
    hub.add("me/pack", {"sport.safetensors": (tmp_path / "x.safetensors").read_bytes()})
    done = run("vectors", "push", "sport", "--to", "me/pack")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "vector 'sport' is for 'acme/Tiny-Mixtral', those of 'me/pack' are for 'acme/other'" in done.err


@pytest.mark.parametrize(
    "card", [b"---\n- a list\n---\n", b"---\na: [\n---\n", b"---\nself: 1\n---\n", b"\xff\xfe", b"x" * (2**20 + 1)]
)
def test_a_card_that_can_not_be_read_is_not_replaced(hub, vectors, run, card):
    repo = hub.add("me/pack")
    repo.commit({"README.md": card})
    done = run("vectors", "push", "sport", "--to", "me/pack")
    assert (done.code, done.err.count("\n")) == (1, 1), done.err
    assert "README.md" in done.err
    assert done.err.endswith(": mend it\n")
    assert repo.files == {"README.md": card}


def test_without_matplotlib_nothing_is_created(hub, vectors, run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    done = run("vectors", "push", "sport", "--to", "me/pack")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "pip install 'steermoe[plot]'" in done.err
    assert hub.repos == {}


# ---- pull ----


@pytest.fixture
def pack(hub, vectors):
    """`me/pack` with sport and food and their card, and an empty working folder."""
    paths = sorted(vectors.rglob("*.safetensors"))
    card = preview([read_vector(path) for path in paths], "me/pack", Push())
    files = {path.name: path.read_bytes() for path in paths}
    for path in paths:
        path.unlink()
    return hub.add("me/pack", {**files, "README.md": card.encode()})


def test_pull(pack, run, vectors):
    done = run("vectors", "pull", "me/pack")
    folder = "steering_vectors/Tiny-Mixtral"
    assert (done.code, done.out) == (0, f"{folder}/food.safetensors\n{folder}/sport.safetensors\n")
    assert done.err == f"from me/pack at {pack.names['main']}\n"
    shown = json.loads(run("vectors", "show", "sport", "--json").out)
    assert shown["source"] == f"hub:me/pack/sport@{pack.names['main']}"
    assert re.search(rf"^pulled from +{shown['source']}$", run("vectors", "show", "sport").out, re.MULTILINE)
    again = run("vectors", "pull", "me/pack", "sport")
    assert (again.code, again.err.count("\n")) == (1, 1)
    assert "already exists: pass --force" in again.err
    (record,) = json.loads(run("vectors", "pull", "hub:me/pack/sport", "--force", "--json").out)
    assert (record["domain"], record["source"]) == ("sport", shown["source"])


def test_pull_for_a_model(hub, run, tiny_checkpoint, make_vector, bare_search_path, tmp_path):
    write_vector(make_vector(info=VectorInfo(model="acme/other")), tmp_path / "made.safetensors")
    hub.add("you/pack", {"sport.safetensors": (tmp_path / "made.safetensors").read_bytes()})
    done = run("vectors", "pull", "you/pack", "--model", tiny_checkpoint)
    assert done.code == 1
    assert "vector 'sport' was built for acme/other, and tiny-mixtral has none of its own" in done.err
    assert list(bare_search_path.iterdir()) == []
    assert run("vectors", "pull", "you/pack", "--model", tiny_checkpoint, "--any-model", "-o", "there").code == 0
    assert len(list((bare_search_path / "there").glob("*.safetensors"))) == 1


def test_files_that_are_left_out_are_named(hub, pack, run):
    pack.commit({**pack.files, "a/b.safetensors": b"", "Model-1.safetensors": b""})
    done = run("vectors", "pull", "me/pack")
    assert done.code == 0
    assert "steermoe: left out 'a/b.safetensors' of me/pack: its name is not DOMAIN.safetensors\n" in done.err
    assert "steermoe: left out 'Model-1.safetensors' of me/pack" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["me/nothing"], "the Hub has no 'me/nothing', or it is private"),
        (["me/pack", "law"], "'me/pack' has no vector 'law' at"),
        (["me/pack", "../law"], "domain name '../law' is not allowed"),
        (["me/pack", "--revision", "v9"], "'me/pack' has no revision 'v9'"),
        (["me/pack", "--revision", "../x"], "'../x' is no revision"),
        (["../pack"], "'../pack' is no repository of the Hub"),
        (["hub:me/pack"], "'hub:me/pack' is no place on the Hub: write hub:USER/REPO/DOMAIN"),
    ],
)
def test_pulls_that_are_refused(pack, run, arguments, message):
    done = run("vectors", "pull", *arguments)
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert message in done.err


def test_two_revisions_are_refused(run, bare_search_path):
    done = run("vectors", "pull", "hub:me/pack/sport@v1", "--revision", "v2")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert "'hub:me/pack/sport@v1' and --revision v2 name two revisions: leave one of them out" in done.err


# ---- search ----


def test_search(hub, pack, run, tiny_checkpoint):
    pack.downloads = 7
    hub.add(
        "you/chess",
        {"README.md": b"---\ntags: [steermoe-vector]\nbase_model: acme/Other\n---\n", "chess.safetensors": b""},
        downloads=99,
    )
    hub.add("you/model", {"README.md": b"---\ntags: [mixture-of-experts]\n---\n"})
    hub.add(
        "you/hostile",
        {
            "README.md": b"---\ntags: [steermoe-vector]\nsteermoe: [1]\nbase_model: [3]\nlicense: {a: 1}\n---\n",
            "\x1b[2J.safetensors": b"",
        },
    )
    hub.add("you/private", {"README.md": b"---\ntags: [steermoe-vector]\n---\n"}, private=True)

    def found(*arguments):
        done = run("vectors", "search", "--json", *arguments)
        assert done.code == 0, done.err
        return [one["repo"] for one in json.loads(done.out)]

    assert found() == ["you/chess", "me/pack", "you/hostile"]
    assert found("GOAL", "sport") == ["me/pack"]
    assert found("chess") == ["you/chess"]
    assert found("nothing of the kind") == []
    assert found("--model", "acme/Tiny-Mixtral") == found("--model", "someone/tiny-mixtral-GGUF") == ["me/pack"]
    assert found("--model", "acme/other") == ["you/chess"]
    assert found("--model", tiny_checkpoint) == []  # it has the name, and other routers
    (record,) = json.loads(run("vectors", "search", "sport", "--json").out)
    assert record == {
        "repo": "me/pack",
        "domains": ["food", "sport"],
        "model": "acme/Tiny-Mixtral",
        "base_model": "acme/Tiny-Mixtral",
        "fingerprint": "0123456789abcdef",
        "licence": "apache-2.0",
        "keywords": ["team", "goal"] * 2,
        "downloads": 7,
        "updated": "2026-11-29",
    }
    table = run("vectors", "search").out
    assert "\x1b" not in table
    assert "me/pack      acme/Tiny-Mixtral  apache-2.0  7          2026-11-29  food, sport\n" in table
    assert run("vectors", "search", "nothing of the kind").err == "no pack of vectors on the Hub is like that\n"


def test_a_search_goes_past_packs_of_odd_form(hub, pack, run):
    card = b"---\ntags: [steermoe-vector]\nself: 1\nignore_metadata_errors: 2\n---\n"
    hub.add("you/self", {"README.md": card})
    hub.add("you/nameless", {"README.md": card})
    hub.add("you/odd", {"README.md": card})
    odd = {"you/nameless": {"id": None}, "you/odd": {"siblings": [1, {}], "downloads": "x", "lastModified": 5}}
    hub.on_listing = lambda listing: listing | odd.get(listing["id"], {})
    done = run("vectors", "search", "--json")
    assert done.code == 0, done.err
    found = {one["repo"]: one for one in json.loads(done.out)}
    assert set(found) == {"me/pack", "you/self", "you/odd"}
    assert (found["you/odd"]["domains"], found["you/odd"]["downloads"], found["you/odd"]["updated"]) == ([], 0, "")


def test_a_search_that_the_hub_refuses(pack, hub, run):
    def fail(listing):
        raise Answer(501, "", "too busy")

    hub.on_listing = fail
    done = run("vectors", "search")
    assert (done.code, done.err) == (1, "steermoe: the Hub answers 501 for the search (too busy): try again later\n")


# ---- no network ----


@pytest.mark.parametrize(
    "arguments",
    [["push", "sport", "--to", "me/new"], ["pull", "you/new"], ["search", "x"], ["show", "hub:you/new/sport"]],
)
@pytest.mark.parametrize("how", ["away", "offline"])
def test_without_a_network_there_is_one_line(vectors, run, monkeypatch, arguments, how):
    monkeypatch.setattr(constants, *(("ENDPOINT", "http://127.0.0.1:9") if how == "away" else ("HF_HUB_OFFLINE", True)))
    done = run("vectors", *arguments)
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert done.err.startswith(
        "steermoe: can't reach the Hub at http://127.0.0.1:9 ("
        if how == "away"
        else "steermoe: the Hub is not asked, since HF_HUB_OFFLINE is set"
    )


def test_pull_offline_takes_the_copies(pack, run, monkeypatch):
    assert run("vectors", "pull", "me/pack", "-o", "a").code == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = run("vectors", "pull", "me/pack", "-o", "b")
    assert (done.code, done.out) == (0, "b/food.safetensors\nb/sport.safetensors\n")
    assert "these are copies that were pulled before\n" in done.err


# ---- -d hub:... ----


@pytest.fixture
def shared(hub, bare_search_path, make_vector, tmp_path):
    """`you/pack` with a vector of the tiny model."""
    write_vector(make_vector(), tmp_path / "made.safetensors")
    return hub.add("you/pack", {"sport.safetensors": (tmp_path / "made.safetensors").read_bytes()})


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "It rained.", "-d", "hub:you/pack/sport", "--max-new-tokens", "3"],
        [
            "generate",
            "It rained.",
            "-d",
            "hub:you/pack/sport@main=0.5",
            "-d",
            "hub:you/pack/sport=0.5",
            "--max-new-tokens",
            "3",
        ],
        ["compare", "It rained.", "-d", "hub:you/pack/sport=0.5+hub:you/pack/sport", "--max-new-tokens", "3"],
        ["vectors", "mix", "hub:you/pack/sport=0.5", "-o", "half"],
        ["vectors", "show", "hub:you/pack/sport"],
        ["vectors", "check", "hub:you/pack/sport"],
    ],
)
def test_a_place_is_taken_for_a_domain(shared, run, tiny_checkpoint, arguments):
    with_model = ["--model", tiny_checkpoint] if arguments[0] != "vectors" else []
    done = run(*arguments, *with_model)
    assert done.code == 0, done.err
    assert done.out.strip()
    assert f"hub:you/pack/sport@{shared.names['main']}" in done.err


def test_a_place_in_a_batch(shared, run, tiny_checkpoint, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "It rained.", "domain": "hub:you/pack/sport"}\n'
        '{"prompt": "It snowed.", "domain": {"hub:you/pack/sport": 0.5}}\n'
    )
    done = run(
        "batch",
        tmp_path / "prompts.jsonl",
        "-o",
        tmp_path / "out.jsonl",
        "--model",
        tiny_checkpoint,
        "--max-new-tokens",
        "3",
    )
    assert done.code == 0, done.err
    stories = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(story["domain"] for story in stories) == ["hub:you/pack/sport", "hub:you/pack/sport=0.5"]


def test_a_file_on_the_hub_is_never_changed(shared, run, tiny_checkpoint):
    for arguments in (
        ["vectors", "check", "hub:you/pack/sport", "--rehash"],
        ["calibrate", "-d", "hub:you/pack/sport", "--model", tiny_checkpoint],
    ):
        done = run(*arguments)
        assert (done.code, done.err.count("\n")) == (1, 1)
        assert "'hub:you/pack/sport' is on the Hub, where nothing is changed" in done.err


def test_requests_name_domains_never_places(hub, tiny_model):
    from steermoe.errors import VectorError

    resolver = PlanResolver(tiny_model.shape, names_only=True, watch=True)
    for domain in ("hub:you/pack/sport", "hub:you/pack/sport=0.5", "hub:/etc/passwd"):
        with pytest.raises(
            VectorError, match="is a place on the Hub: requests name domains; pull it on the server with"
        ):
            resolver.plan(SteeringSpec(domain=(domain,)))
    assert hub.requests == []


# ---- a model's name ----


def test_a_wrong_model_s_name_without_a_network(hub, run, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    done = run("generate", "--model", "WRONG/NAME")
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert done.err.startswith(
        "steermoe: can't find 'WRONG/NAME', neither as a folder nor on the hub: can't reach the Hub at"
    )
    assert time.monotonic() - started < 10


def test_a_model_in_the_cache_is_found_without_a_network(hub, tiny_checkpoint, monkeypatch):
    hub.add("acme/tiny", {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()})
    name, where, _ = _locate("acme/tiny")
    assert (name, where) == ("acme/tiny", "acme/tiny")
    for path in tiny_checkpoint.iterdir():
        hf_hub_download("acme/tiny", path.name)
    monkeypatch.setattr(checkpoint, "_answered", set())
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    name, where, _ = _locate("acme/tiny")
    assert name == "acme/tiny"
    assert {path.name for path in Path(where).iterdir()} >= {path.name for path in tiny_checkpoint.iterdir()}
    assert describe("acme/tiny").shape.name == "acme/tiny"


# ---- from Python ----


def test_push_to_hub(hub, make_vector):
    url = make_vector(info=INFO).push_to_hub("me/pack", commit_message="My first", private=True, licence="mit")
    repo = hub.repos["me/pack"]
    assert url.endswith(f"/me/pack/commit/{repo.names['main']}")
    assert repo.private
    assert front_matter(repo.files["README.md"])["license"] == "mit"
    assert SteeringVector.from_pretrained("me/pack").info.fingerprint == INFO.fingerprint
