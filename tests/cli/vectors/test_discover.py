"""`steermoe vectors discover`: the report, what goes to stdout and stderr, renaming, and wrong input in one line."""

import json

import numpy as np
import pytest

from steermoe.discovery.store import EmbeddingMeta, EmbeddingStore, Text
from steermoe.vectors.file import read_vector

LAYERS, EXPERTS = 4, 8
ONE_SEED = ("--other-seeds", "0")
"""Where stability is not the point: clustering once takes half the time."""
WORDS = {"sport": "referee goal", "food": "butter bread", "law": "judge witness"}


@pytest.fixture(autouse=True, scope="module")
def _extra():
    for module in ("matplotlib", "plotly", "umap"):
        pytest.importorskip(module)


def make_store(folder, *, labels=True, complete=True) -> EmbeddingStore:
    """Embeddings of three domains, 16 texts each and more, in two shards."""
    random = np.random.default_rng(0)
    store = EmbeddingStore.create(folder, EmbeddingMeta("tiny-mixtral", "mixtral", tuple(range(LAYERS)), EXPERTS, 2))
    texts, rows = [], []
    for expert, (domain, words) in enumerate(WORDS.items()):
        mean = np.full(EXPERTS, 0.02)
        mean[expert] = 0.86
        for number in range(16 + 2 * expert):
            texts.append(Text(f"{domain}/{number}", f"the {words} of day {number}", domain if labels else ""))
            rows.append(random.dirichlet(100 * mean, size=LAYERS))
    frequency = np.array(rows, dtype=np.float32)
    for shard, part in enumerate((slice(0, 30), slice(30, None))):
        store.write_shard(shard, texts[part], [20] * len(texts[part]), frequency[part], None)
    if complete:
        store.finish(len(texts))
    return store


@pytest.fixture
def embeddings(tmp_path):
    return make_store(tmp_path / "emb").folder


def one_line(text: str) -> str:
    """The only line of an error, without its newline."""
    assert text.count("\n") == 1, text
    return text[:-1]


def test_discover_in_embeddings(run, embeddings, tmp_path):
    code, out, err = run("vectors", "discover", embeddings, "-o", tmp_path / "report", "--threshold", "1.5")
    assert code == 0, err
    header, *rows, noise, agreement = out.splitlines()
    assert header.split() == ["no.", "name", "texts", "main", "source", "keywords"]
    assert [row.split()[:5] for row in rows] == [
        ["0", "judge-witness", "20", "law", "100%"],
        ["1", "bread-butter", "18", "food", "100%"],
        ["2", "goal-referee", "16", "sport", "100%"],
    ]
    assert noise == "in no cluster: 0 of 54 texts"
    assert agreement == "agreement with the known sources (adjusted Rand index): 1.000"
    assert one_line(err) == f"report in {tmp_path / 'report' / 'index.html'}"
    for name in ("index.html", "map.html", "map_sources.png", "heat_goal-referee.png", "report.json"):
        assert (tmp_path / "report" / name).is_file()
    vector = read_vector(tmp_path / "report" / "vectors" / "goal-referee.safetensors")
    assert vector.chosen().keys() == set(range(LAYERS))
    assert vector.relative


def test_its_vectors_can_be_listed_and_shown(run, embeddings, tmp_path, bare_search_path):
    run("vectors", "discover", embeddings, "-o", tmp_path / "report", "--threshold", "1.5", *ONE_SEED)
    listed = run("vectors", "list", "--vectors", tmp_path / "report" / "vectors")
    assert [line.split()[0] for line in listed.out.splitlines()[1:]] == [
        "bread-butter",
        "goal-referee",
        "judge-witness",
    ]
    shown = run("vectors", "show", "goal-referee", "--vectors", tmp_path / "report" / "vectors")
    assert "steermoe vectors discover" in shown.out


def test_json_is_the_report(run, embeddings, tmp_path):
    code, out, err = run("vectors", "discover", embeddings, "-o", tmp_path / "report", "--json", "--seed", "3")
    assert code == 0, err
    record = json.loads(one_line(out))
    assert record == json.loads((tmp_path / "report" / "report.json").read_text())
    assert record["settings"]["seed"] == 3


def test_options_reach_the_clustering(run, embeddings, tmp_path):
    options = ["--min-cluster-size", "10", "--neighbours", "7", "--dimensions", "2", "--metric", "cosine"]
    options += [*ONE_SEED, "--absolute", "--assign-noise", "--threshold", "2"]
    settings = json.loads(run("vectors", "discover", embeddings, "-o", tmp_path / "r", "--json", *options).out)[
        "settings"
    ]
    assert settings == {
        "threshold": 2.0,
        "relative": False,
        "algorithm": "hdbscan",
        "cluster_dimensions": 2,
        "min_cluster_size": 10,
        "neighbours": 7,
        "metric": "cosine",
        "assign_noise": True,
        "seed": 0,
        "clusters": None,
        "selection": "eom",
        "other_seeds": 0,
        "hidden": False,
    }


def test_a_wanted_number_of_clusters(run, embeddings, tmp_path):
    options = ["--clusters", "3", "--selection", "leaf", "--other-seeds", "0"]
    code, out, err = run("vectors", "discover", embeddings, "-o", tmp_path / "report", "--json", *options)
    assert code == 0, err
    record = json.loads(out)
    assert [cluster["size"] for cluster in record["clusters"]] == [20, 18, 16]
    assert (record["settings"]["clusters"], record["settings"]["selection"], record["stability"]) == (3, "leaf", None)


def test_what_speaks_against_the_clusters_is_on_stderr(run, embeddings, tmp_path, monkeypatch):
    from steermoe.discovery import clustering

    monkeypatch.setattr(clustering, "agreement_of_seeds", lambda *arguments: 0.115)
    code, out, err = run("vectors", "discover", embeddings, "-o", tmp_path / "report", "--threshold", "1.5")
    assert code == 0
    warning, _ = err.splitlines()
    assert warning.startswith("steermoe: another seed gives other clusters (adjusted Rand index 0.1")
    assert "another seed" not in out
    record = json.loads((tmp_path / "report" / "report.json").read_text())
    assert record["warnings"] == [warning.removeprefix("steermoe: ")]


def test_texts_that_are_all_alike_have_advice_and_no_figure(run, tmp_path):
    meta = EmbeddingMeta("tiny-mixtral", "mixtral", tuple(range(LAYERS)), EXPERTS, 2)
    store = EmbeddingStore.create(tmp_path / "emb", meta)
    texts = [Text(str(number), "the same text", "news") for number in range(60)]
    store.write_shard(0, texts, [20] * 60, np.full((60, LAYERS, EXPERTS), 1 / EXPERTS, dtype=np.float32), None)
    store.finish(60)
    code, out, err = run("vectors", "discover", store.folder, "-o", tmp_path / "report")
    assert code == 0
    assert out == "in no cluster: 60 of 60 texts\n"
    assert err.splitlines()[0].startswith("steermoe: no cluster was found: the model routes these texts alike; give")


def test_names_in_any_script_work_to_the_end(run, embeddings, tmp_path, bare_search_path):
    command = ["vectors", "discover", embeddings, "-o", tmp_path / "report", "--threshold", "1.5", *ONE_SEED]
    assert run(*command, "--name", "0=погода").code == 0
    assert run(*command, "--name", "погода=x", "--force").code == 1  # names come from keywords, not from an earlier run
    shown = run("vectors", "show", "погода", "--vectors", tmp_path / "report" / "vectors")
    assert shown.code == 0, shown.err


def test_clusters_are_renamed_in_a_second_run(run, embeddings, tmp_path):
    arguments = ["vectors", "discover", embeddings, "-o", tmp_path / "report", "--threshold", "1.5", *ONE_SEED]
    assert run(*arguments).code == 0
    again = run(*arguments, "--name", "0=law", "--name", "goal-referee=football", "--force")
    assert again.code == 0, again.err
    assert [line.split()[1] for line in again.out.splitlines()[1:4]] == ["law", "bread-butter", "football"]
    names = sorted(path.stem for path in (tmp_path / "report" / "vectors").iterdir())
    assert names == ["bread-butter", "football", "law"]


def test_weak_vectors_are_reported_on_stderr(run, embeddings, tmp_path):
    code, out, err = run("vectors", "discover", embeddings, "-o", tmp_path / "report", "--threshold", "7.5", *ONE_SEED)
    assert code == 0
    assert err.count("no vector: no expert's share exceeds 7.5 x the baseline") == 3
    assert not (tmp_path / "report" / "vectors").exists()
    assert len(out.splitlines()) == 6


def test_vectors_that_are_cut_elsewhere_share_a_line(run, embeddings, tmp_path):
    code, _, err = run("vectors", "discover", embeddings, "-o", tmp_path / "report", "--threshold", "3.5", *ONE_SEED)
    assert code == 0
    cut, _ = err.splitlines()
    assert cut == (
        "steermoe: 3 vectors are cut at another threshold, the report says why: judge-witness, bread-butter, "
        "goal-referee"
    )
    notes = [one["note"] for one in json.loads((tmp_path / "report" / "report.json").read_text())["clusters"]]
    assert all("cut at 3.5 / 8 instead" in note for note in notes)


def test_embeddings_that_are_not_complete_or_have_no_labels(run, tmp_path):
    folder = make_store(tmp_path / "emb", labels=False, complete=False).folder
    code, out, err = run("vectors", "discover", folder, "-o", tmp_path / "report", *ONE_SEED)
    assert code == 0
    assert f"steermoe: '{folder}' is incomplete" in err
    assert "agreement" not in out
    assert "main source" not in out


def test_a_corpus_is_embedded_first_and_once(run, tmp_path, tiny_checkpoint, monkeypatch):
    corpus = tmp_path / "texts"
    for letter in "az":
        (corpus / letter).mkdir(parents=True)
        for number in range(6):
            (corpus / letter / f"{number}.txt").write_text(letter * 30 + f" {number}")
    arguments = ["vectors", "discover", corpus, "-o", tmp_path / "report", "--model", tiny_checkpoint]
    arguments += ["--threshold", "1", "--max-tokens", "16", "--min-cluster-size", "4", *ONE_SEED]
    code, _, err = run(*arguments)
    assert code == 0, err
    store = EmbeddingStore.open(tmp_path / "report" / "embeddings")
    assert (store.meta.complete, store.meta.texts, store.meta.max_tokens) == (True, 12, 16)
    assert sorted(set(store.load().labels)) == ["a", "z"]
    assert store.meta.hidden
    before = {path: path.stat().st_mtime_ns for path in store.folder.glob("*.npy")}
    code, out, err = run(*arguments, "--force", "--no-hidden", "--json")
    assert code == 0, err
    assert json.loads(out)["settings"]["hidden"] is False
    assert {path: path.stat().st_mtime_ns for path in store.folder.glob("*.npy")} == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--max-tokens", "5"], "were made with --max-tokens 512, not 5: leave out --max-tokens, or embed the corpus"),
        (["--model", "other/model"], "were made with --model tiny-mixtral, not model: leave out --model"),
        (["--dtype", "bfloat16"], "were made without --dtype: leave out --dtype"),
        (["--label-field", "kind"], "were made without --label-field: leave out --label-field"),
        (["--include", "*.py"], "exist already: leave out --include"),
        (["--encoding", "cp1251"], "exist already: leave out --encoding"),
    ],
)
def test_options_that_embeddings_do_not_have_are_refused(run, embeddings, tmp_path, options, expected):
    code, out, err = run("vectors", "discover", embeddings, "-o", tmp_path / "report", *options)
    assert (code, out) == (1, "")
    assert expected in one_line(err)


def test_options_that_embeddings_were_made_with_are_accepted(run, embeddings, tmp_path):
    same = ["--max-tokens", "512", "--model", "somewhere/tiny-mixtral", "--threshold", "1.5", *ONE_SEED]
    assert run("vectors", "discover", embeddings, "-o", tmp_path / "report", *same).code == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--name", "0"], "--name '0': write a cluster's number or name and its new name, for example 3=football"),
        (["--name", "=x"], "--name '=x': write"),
        (["--name", "0=A b"], "domain name 'A b' is not allowed"),
        (["--name", "1=a", "--name", "1=b"], "names cluster '1' twice: 'a' and 'b'"),
        (["--name", "9=a"], "no cluster '9' to be named 'a'; there are: 0 (judge-witness)"),
        (["--name", "9" * 5000 + "=a"], "no cluster '999"),
        (["--clusters", "3", "--min-cluster-size", "4"], "give clusters or min_cluster_size, not both"),
        (["--clusters", "40"], "54 texts are too few for 40 clusters: give at least 80 texts"),
        (["--min-cluster-size", "30"], "54 texts are too few to find clusters of 30 or more: give at least 90"),
        (["--threshold", "inf"], "threshold inf must be a finite number"),
        (["--seed", str(2**40)], "seed is 1099511627776"),
    ],
)
def test_wrong_input_is_one_line(run, embeddings, tmp_path, options, expected):
    code, out, err = run("vectors", "discover", embeddings, "-o", tmp_path / "report", *options)
    assert (code, out) == (1, "")
    assert expected in one_line(err)
    assert not (tmp_path / "report").exists()


def test_an_earlier_report_is_seen_before_the_work(run, tmp_path, embeddings):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text("{}")
    code, _, err = run("vectors", "discover", tmp_path / "no-corpus", "-o", tmp_path / "report")
    assert code == 1
    assert "already has a report (report.json): pass --force" in one_line(err)
    assert run("vectors", "discover", embeddings, "-o", tmp_path / "report", "--force", *ONE_SEED).code == 0


def test_no_corpus(run, tmp_path):
    code, _, err = run("vectors", "discover", tmp_path / "none", "-o", tmp_path / "report")
    assert code == 1
    assert "no corpus at" in one_line(err)
