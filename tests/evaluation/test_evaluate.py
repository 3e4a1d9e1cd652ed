"""A whole evaluation of a tiny model: conditions, the folder that it resumes, the summary, pictures, the command."""

import csv
import json
from dataclasses import replace

import pytest
import torch

from steermoe.engines.hf.engine import HFEngine
from steermoe.errors import CorpusError, SteeringError, SteerMoEError
from steermoe.evaluation import protocol
from steermoe.evaluation.evaluate import Evaluation
from steermoe.evaluation.protocol import Condition, Design, EvaluationSettings, cut_vector, shuffled
from steermoe.evaluation.report import evaluate_into
from steermoe.evaluation.results import ResultFolder
from steermoe.evaluation.texts import domain_list, packaged_texts, read_openings, read_texts
from steermoe.vectors.file import write_vector

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

SENTENCES = {
    "sport": "the striker shot a goal and the {} team won the match in the stadium today",
    "food": "she baked bread with butter and {} cheese and cooked a soup in the kitchen today",
    "neutral": "the old man walked down the {} road with his dog and came home in the evening today",
}
COLOURS = ["red", "green", "blue", "white", "black", "brown", "grey", "pink"]
SETTINGS = EvaluationSettings(("hello there", "once upon"), seeds=2, max_new_tokens=8, forced_texts=4, batch_size=4)


@pytest.fixture
def heldout(tmp_path):
    for label, sentence in SENTENCES.items():
        folder = tmp_path / "heldout" / label
        folder.mkdir(parents=True)
        for number, colour in enumerate(COLOURS):
            (folder / f"{number}.txt").write_text(sentence.format(colour))
    return tmp_path / "heldout"


@pytest.fixture
def texts(heldout):
    from steermoe.discovery.corpus import Corpus

    return read_texts(Corpus(heldout), ["sport", "food"])


@pytest.fixture
def vectors(make_vector):
    food = make_vector("food")
    other = food.frequency.roll(3, 1)
    return {"sport": make_vector("sport"), "food": type(food)("food", other, food.layers, info=food.info)}


# ---- what is run ----


def test_shuffled_keeps_the_weights_but_none_of_their_places(make_vector):
    vector = make_vector(threshold=1.0)
    control = shuffled(vector)
    assert not ((control.experts > 0) & (vector.experts > 0)).any()
    assert torch.equal(control.experts.sort(-1).values, vector.experts.sort(-1).values)
    assert torch.equal(shuffled(vector).experts, control.experts)  # seeded


def test_shuffled_if_most_experts_are_used(make_vector):
    vector = make_vector(threshold=0.0)  # all of them
    assert torch.equal(shuffled(vector).experts.sort(-1).values, vector.experts.sort(-1).values)


def test_by_default_each_vector_steers_as_generate_would(make_vector):
    (only,) = Design().steered(make_vector())
    assert (only.strength, only.formula, only.group) == (
        4.0,
        "max_scaled",
        "steered-max_scaled-magnitude-own-own-strength",
    )


def test_a_design_is_all_combinations(make_vector):
    found = Design(("additive", "max_scaled"), cuts=("own", "absolute"), strengths=(1.0, 2.0)).steered(make_vector())
    assert len(found) == 8
    assert found[0] == Condition("steered", "sport", "max_scaled", strength=2.0)


def test_formulas_are_compared_at_equal_damage(make_vector):
    found = Design(protocol.parse_formulas("all"), ("magnitude", "paper")).steered(make_vector())
    assert {condition.budget for condition in found} == {1.0}
    assert len(found) == 5  # the additive one has no scale


def test_names_of_conditions_are_unique(make_vector):
    vector = make_vector()
    design = Design(protocol.parse_formulas("all"), ("magnitude", "paper"), protocol.CUTS, (1.0, 2.5))
    conditions = design.steered(vector)
    conditions += [control for one in conditions for control in protocol.controls_for(one)]
    assert len({condition.name for condition in conditions}) == len(set(conditions))
    assert all("/" not in condition.name for condition in conditions)


@pytest.mark.parametrize("text", ["", "nonsense", "additive,nonsense"])
def test_unknown_formulas(text):
    with pytest.raises(SteeringError, match="use additive, max_scaled, zero_max_scaled"):
        protocol.parse_formulas(text)


@pytest.mark.parametrize("text", ["", "x", "1,0", "-1", "inf"])
def test_wrong_strengths(text):
    with pytest.raises(SteeringError, match="joined by commas"):
        protocol.parse_numbers(text, "strengths")


def test_cuts(make_vector):
    vector = make_vector()
    assert cut_vector(vector, "own") is vector
    assert not cut_vector(vector, "absolute").relative


# ---- texts ----


def test_packaged_texts_were_not_seen_by_experts_or_vectors():
    from steermoe.models.default import spec
    from steermoe.models.default.stories import load_stories

    packaged = packaged_texts()
    assert set(packaged.labels) == set(spec.TOPICS)
    trained = {story.rest for story in load_stories("train")}
    assert not trained & {text for text, _ in (*packaged.learn, *packaged.measure)}
    for topic in spec.TOPICS:
        own = [text for text, label in packaged.learn if label == topic]
        assert len(set(own)) == len(own) >= 40
        assert len(packaged.of(topic)) >= 20


def test_a_users_texts_are_split(texts):
    assert len(texts.of("sport")) == 4
    assert not set(texts.learn) & set(texts.measure)


def test_too_few_texts_are_reported(heldout):
    from steermoe.discovery.corpus import Corpus

    with pytest.raises(CorpusError, match="has 0 texts labelled 'law', 8 are needed; labels are: food, neutral, sport"):
        read_texts(Corpus(heldout), ["law"])


def test_openings(tmp_path):
    (tmp_path / "lines.txt").write_text("One.\n\nTwo.\nOne.\n")
    assert read_openings(tmp_path / "lines.txt") == ["One.", "Two."]
    (tmp_path / "lines.jsonl").write_text('{"prompt": "One."}\n{"text": 1}\n')
    with pytest.raises(CorpusError, match="line 2 is not a JSON object with a prompt"):
        read_openings(tmp_path / "lines.jsonl")
    with pytest.raises(CorpusError, match="can't read openings"):
        read_openings(tmp_path / "missing.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(CorpusError, match="contains no openings"):
        read_openings(tmp_path / "empty.txt")


def test_lists_leave_out_the_vectors_own_words(tmp_path):
    (tmp_path / "chess.txt").write_text("rook\nbishops\nqueen\n")
    assert domain_list("chess", ["bishop", "queen"], tmp_path) == ["bishops", "rook"][1:]
    assert domain_list("nothing", [], tmp_path) == []


# ---- the run ----


def test_everything_is_there_and_a_second_run_generates_nothing(tiny_model, vectors, texts, tmp_path, monkeypatch):
    design = Design(strengths=(2.0, 8.0))
    folder = tmp_path / "out"
    first = evaluate_into(folder, tiny_model, vectors, texts, SETTINGS, design)
    assert {path.name for path in folder.glob("*.png")} == {"pareto.png", "sweep.png", "domains.png", "confusion.png"}
    assert first["strength_0"] == 0
    assert len(first["conditions"]) == 2 * (2 + 3)
    assert json.loads((folder / "evaluation.json").read_text())["groups"] == first["groups"]
    tables = (folder / "summary.md").read_text()
    assert "### Domains and controls" in tables
    assert "### Formulas" not in tables  # one formula only
    rows = list(csv.DictReader((folder / "conditions.csv").read_text().splitlines()))
    assert len(rows) == len(first["conditions"])
    assert {row["kind"] for row in rows} == {"steered", "shuffled", "prompted", "both"}
    main = next(row for row in first["conditions"] if row["group"] == first["main_group"])
    assert main["strength"] == 8.0
    assert main["on_texts"]["kl_p95"] > 0
    assert "lift" in main["on_texts"]
    assert 0 <= main["figures"]["success"]["low"] <= main["figures"]["success"]["high"] <= 1

    def generate_again(*args, **kwargs):
        raise AssertionError("generated a story again")

    monkeypatch.setattr(HFEngine, "generate", generate_again)
    second = evaluate_into(folder, tiny_model, vectors, texts, SETTINGS, design)
    assert {k: v for k, v in second.items() if k != "seconds"} == {k: v for k, v in first.items() if k != "seconds"}


def test_vectors_that_steer_by_different_formulas(tiny_model, vectors, texts, tmp_path):
    food = vectors["food"]
    vectors["food"] = replace(food, info=replace(food.info, formula="additive"))
    summary = evaluate_into(tmp_path / "out", tiny_model, vectors, texts, SETTINGS, Design(controls=False))
    assert {row["domain"]: row["formula"] for row in summary["conditions"]} == {
        "sport": "max_scaled",
        "food": "additive",
    }
    table = (tmp_path / "out" / "summary.md").read_text().split("### ")[1]
    assert "| sport |" in table
    assert "| food |" not in table


def test_a_run_that_was_killed_resumes(tiny_model, vectors, texts, tmp_path, monkeypatch):
    calls, generate = [], HFEngine.generate

    def dies(self, requests, **kwargs):
        calls.append(len(requests))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(self, requests, **kwargs)

    monkeypatch.setattr(HFEngine, "generate", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate_into(tmp_path / "killed", tiny_model, vectors, texts, SETTINGS, Design())
    kept = {path.name: path.read_bytes() for path in (tmp_path / "killed" / "stories").iterdir()}
    assert len(kept) == 3
    killed = evaluate_into(tmp_path / "killed", tiny_model, vectors, texts, SETTINGS, Design())
    whole = evaluate_into(tmp_path / "whole", tiny_model, vectors, texts, SETTINGS, Design())
    assert killed["conditions"] == whole["conditions"]
    assert all((tmp_path / "killed" / "stories" / name).read_bytes() == content for name, content in kept.items())


def test_strengths_that_follow_a_budget_stay_within_it(tiny_model, vectors, texts, tmp_path):
    design = Design(protocol.parse_formulas("all"), budgets=(2e-5, 1.0), controls=False)
    summary = evaluate_into(tmp_path / "out", tiny_model, vectors, texts, SETTINGS, design)
    assert len(summary["groups"]) == 6
    for row in summary["conditions"]:
        assert row["on_texts"]["kl_p95"] <= row["budget"]
    assert "### Formulas at equal damage budget" in (tmp_path / "out" / "summary.md").read_text()
    compared = summary["formulas"]["equal_damage"]
    assert {(pair["worse"], pair["better"]) for pair in compared} == {
        ("additive", "max_scaled"),
        ("max_scaled", "zero_max_scaled"),
    }


def test_a_folder_with_other_settings_is_rejected(tiny_model, vectors, texts, tmp_path):
    evaluate_into(tmp_path / "out", tiny_model, vectors, texts, SETTINGS, Design(controls=False))
    other = EvaluationSettings(("hello there",), seeds=2, max_new_tokens=8, forced_texts=4, batch_size=4)
    with pytest.raises(SteerMoEError, match=r"begun with other settings \(openings: "):
        evaluate_into(tmp_path / "out", tiny_model, vectors, texts, other, Design())


def test_folders_from_before_top_p_and_min_p_can_be_resumed():
    assert not {"top_p", "min_p"} & SETTINGS.as_dict().keys()
    assert replace(SETTINGS, top_p=0.5, min_p=0.1).as_dict() == {**SETTINGS.as_dict(), "top_p": 0.5, "min_p": 0.1}


@pytest.mark.parametrize("least", [{"min_p": 1.0}, {"top_p": 1e-9}])
def test_stories_are_drawn_as_the_settings_say(tiny_model, vectors, texts, tmp_path, least):
    """Where only the likeliest token is left, all seeds give the same story, however high the temperature."""
    for more, different in (({}, 4), (least, 2)):
        settings = replace(SETTINGS, temperature=50.0, **more)
        folder = ResultFolder(tmp_path / str(different), settings.as_dict())
        stories = Evaluation(tiny_model, vectors, texts, settings, folder).stories(Condition("unsteered"))
        assert len({(story.opening, story.token_ids) for story in stories}) == different


def test_a_damaged_file_is_named(tmp_path):
    folder = ResultFolder(tmp_path, {"a": 1})
    (tmp_path / "stories" / "x.jsonl").write_text('{"opening": 0}\n')
    with pytest.raises(SteerMoEError, match=r"x\.jsonl' is damaged"):
        folder.stories("x", list)


def test_a_control_that_fails_is_reported(
    tiny_model, vectors, texts, tmp_path, run, heldout, bare_search_path, tiny_checkpoint
):
    for domain, vector in vectors.items():  # a random model: no vector does anything, so neither does the true one
        write_vector(vector, bare_search_path / "steering_vectors" / "tiny-mixtral" / f"{domain}.safetensors")
    (tmp_path / "openings.txt").write_text("hello there\nonce upon\n")
    code, out, err = run(
        "evaluate", "--model", tiny_checkpoint, "--openings", tmp_path / "openings.txt", "--heldout", heldout,
        "--max-new-tokens", "6", "--texts", "4", "--seeds", "1", "-o", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    assert "CONTROL FAILED  sport: the vector with shuffled experts does as much as the true one" in err
    titles, *rows = out.splitlines()
    assert titles.split()[:3] == ["domain", "condition", "strength"]
    assert [row.split()[0] for row in rows] == ["food"] * 4 + ["sport"] * 4 + ["all"] * 4


def test_a_domain_without_texts_is_reported(run, bare_search_path, make_vector, tiny_checkpoint, tmp_path):
    write_vector(make_vector("chess"), bare_search_path / "steering_vectors" / "tiny-mixtral" / "chess.safetensors")
    code, _, err = run("evaluate", "-d", "chess", "--model", tiny_checkpoint, "-o", tmp_path / "out")
    assert code == 1
    assert "no held-out texts of 'chess' came with steermoe" in err
    assert err.count("\n") == 1
