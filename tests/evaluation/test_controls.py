"""More controls: random and popular experts, steering away, and how far other judges agree with the classifier."""

import numpy as np
import pytest
import torch

from steermoe.errors import ModelError
from steermoe.evaluation import controls
from steermoe.evaluation.agreement import SentenceModel, agreement, by_nearest, by_words, cohens_kappa
from steermoe.evaluation.controls import complaints_of
from steermoe.evaluation.protocol import Condition, popular, random_like
from steermoe.evaluation.results import StoryRecord
from steermoe.evaluation.teacher_forcing import TeacherForcing
from steermoe.evaluation.texts import Labelled
from steermoe.vectors.file import write_vector

pytest.importorskip("sklearn")

COLOURS = ["red", "green", "blue", "white", "black", "brown", "grey", "pink"]
LEARN = (("the striker shot a goal and won", "sport"), ("bread with butter and cheese", "food"), ("he went", "neutral"))


def test_random_vectors_keep_sparsity_and_norm_of_each_layer(make_vector):
    vector = make_vector(threshold=0.1)  # all experts; then one
    for one in (vector, make_vector(threshold=1.0)):
        drawn = [random_like(one, seed) for seed in range(3)]
        for found in drawn:
            assert torch.equal(found.experts.count_nonzero(1), one.experts.count_nonzero(1))
            torch.testing.assert_close(found.experts.norm(dim=1), one.experts.norm(dim=1))
        assert not torch.equal(drawn[0].experts, drawn[1].experts)
        assert torch.equal(random_like(one, 1).experts, drawn[1].experts)


def test_popular_experts_get_the_weights(make_vector):
    vector = make_vector(threshold=1.0)
    usual = torch.rand(3, 8)
    found = popular(vector, usual).experts
    assert torch.equal(found.argmax(1), usual.argmax(1))
    assert torch.equal(found.sort(1).values, vector.experts.sort(1).values)


def test_popularity_is_what_texts_use(tiny_model, make_vector):
    forcing = TeacherForcing(tiny_model, ["a sentence of some length, about nothing at all"])
    usual = forcing.popularity(8)
    assert usual.shape == (3, 8)
    torch.testing.assert_close(usual.sum(1), torch.ones(3))
    plan = Condition("popular", "sport", strength=60.0, formula="additive").plan(make_vector(), lambda: usual)
    assert forcing.compare(plan).vector_share > 0.4  # in each layer one of two choices is the popular expert


def test_names_of_conditions_differ():
    kinds = [Condition("negative", "sport", strength=-4.0), Condition("popular", "sport", strength=4.0)]
    kinds += [Condition("random", "sport", strength=4.0, draw=draw) for draw in range(2)]
    assert len({one.name for one in kinds}) == 4
    assert "draw" not in kinds[0].as_dict()


def test_complaints():
    def of(away, drawn, often):
        lifts = {"true": {"lift": 0.2}, "negative": {"lift": away}, "popular": {"lift": often}}
        return complaints_of([{"domain": "sport", **lifts, "random": {"lift": drawn}}])

    assert of(-0.1, [0.1, 0.0], 0.0) == []
    assert [line.split(": ")[1][:20] for line in of(0.1, [0.3, 0.0], 0.2)] == [
        "steering away does n",
        "1 of 2 random vector",
        "popular experts lift",
    ]


# ---- judges ----


def test_kappa_is_that_of_scikit_learn():
    from sklearn.metrics import cohen_kappa_score

    random = np.random.default_rng(0)
    one, other = random.integers(4, size=(2, 300))
    other = np.where(random.random(300) < 0.5, one, other)
    counts = np.zeros((4, 4))
    np.add.at(counts, (one, other), 1)
    assert cohens_kappa(counts) == pytest.approx(cohen_kappa_score(one, other))
    assert cohens_kappa(np.diag([5.0, 0.0])) == 1.0


def test_words_judge_by_the_most_of_one_list():
    judge = by_words({"sport": ["goal", "match"], "food": ["bread", "match"], "neutral": []})
    texts = ["A goal in the match.", "Bread.", "Nothing.", "A match."]
    assert judge(texts) == ["sport", "food", "neutral", "neutral"]


@pytest.fixture(scope="module")
def sentence_folder(tmp_path_factory, tiny_checkpoint):
    """A random encoder: nearest to any text is that text itself."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("sentence")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=257, max_position_embeddings=128, **sizes)).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    return folder


def test_sentence_model(sentence_folder, tmp_path):
    model = SentenceModel(sentence_folder)
    found = model.embed(["hello", "a text that is much longer"])
    assert np.linalg.norm(found, axis=1) == pytest.approx([1, 1])
    assert found[0] == pytest.approx(model.embed(["hello"])[0], abs=1e-5)  # padding does not count
    assert model.embed([]).shape == (0, 16)
    texts = Labelled(LEARN, ())
    assert by_nearest(texts, model)([text for text, _ in LEARN]) == [label for _, label in LEARN]
    with pytest.raises(ModelError, match="holds no model"):
        SentenceModel(tmp_path)


class Knows:
    """A classifier of texts that name their topic."""

    labels = ("food", "neutral", "sport")

    def probabilities(self, texts):
        return np.array([[label in text for label in self.labels] for text in texts], dtype=float)


def test_agreement():
    stories = [
        StoryRecord(number, 0, text, (), "", None, {}, None)
        for number, text in enumerate(["sport goal", "food bread", "neutral goal", "sport"])
    ]
    found = agreement(Knows(), {"words": by_words({"sport": ["goal"], "food": ["bread"]})}, stories)["words"]
    assert (found["texts"], found["same"]) == (4, 0.5)
    assert found["kappa"]["mean"] == pytest.approx((1 / 2 - 6 / 16) / (1 - 6 / 16))
    assert found["kappa"]["low"] <= found["kappa"]["mean"] <= found["kappa"]["high"]
    assert (found["named"]["texts"], found["named"]["same"]) == (3, pytest.approx(2 / 3))
    nobody = agreement(Knows(), {"words": by_words({})}, stories)["words"]
    assert nobody["named"] == {"texts": 0, "same": None, "kappa": None}


# ---- the command ----


@pytest.fixture
def heldout(tmp_path):
    for label, sentence in {"sport": "the striker shot a {} goal", "neutral": "he walked down the {} road"}.items():
        folder = tmp_path / "heldout" / label
        folder.mkdir(parents=True)
        for number, colour in enumerate(COLOURS):
            (folder / f"{number}.txt").write_text(f"{sentence.format(colour)} and came home in the evening today")
    return tmp_path / "heldout"


def test_the_command(
    run, tmp_path, heldout, bare_search_path, tiny_checkpoint, make_vector, sentence_folder, monkeypatch
):
    import json

    pytest.importorskip("matplotlib")
    monkeypatch.setattr(controls, "RANDOM_DRAWS", 3)
    write_vector(make_vector(), bare_search_path / "steering_vectors" / "tiny-mixtral" / "sport.safetensors")
    (tmp_path / "openings.txt").write_text("hello there\nonce upon\n")
    arguments = (
        "evaluate", "-d", "sport", "--model", tiny_checkpoint, "--openings", tmp_path / "openings.txt",
        "--heldout", heldout, "--max-new-tokens", "4", "--texts", "4", "--seeds", "1", "-o", tmp_path / "out",
    )  # fmt: skip
    code, out, err = run(*arguments, "--more-controls", "--second-judge", sentence_folder)
    assert code == 0, err
    assert "best of the random ones" in out
    assert "nearest text" in out
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    (found,) = summary["more_controls"]
    assert len(found["random"]["lift"]) == 3
    assert set(summary["agreement"]) == {"words", "nearest text"}
    assert "### Agreement of the classifier" in (tmp_path / "out" / "summary.md").read_text()
    assert len(list((tmp_path / "out" / "stories").glob("*-random-*"))) == controls.RANDOM_STORIES
    code, _, err = run(*arguments, "--second-judge", sentence_folder)
    assert (code, "--second-judge is asked only with --more-controls" in err) == (2, True)
