"""Vectors of topics on demand: built and calibrated once, resumed, and kept apart from others."""

from dataclasses import replace

import pytest

from steermoe.discovery import topic as topics
from steermoe.discovery.writing import Writing
from steermoe.errors import VectorNotFound
from steermoe.evaluation import provision, topic_vectors
from steermoe.evaluation.provision import kept_folder
from steermoe.evaluation.topic_vectors import (
    TopicWish,
    check_topics_there,
    lacking_topics,
    provide_topics,
    topic_files,
)
from steermoe.vectors.file import read_vector, write_vector

SHORT = Writing(texts=6, new_tokens=24)


class Notes:
    """A watcher that keeps its lines."""

    def __init__(self):
        self.lines = []

    def note(self, text, style=""):
        self.lines.append(text)

    def counting(self, what, things, total):
        return provision.SILENT.counting(what, things, total)

    def working(self, what):
        return provision.SILENT.working(what)


@pytest.fixture
def wish(monkeypatch, bare_search_path, tmp_path):
    monkeypatch.setattr(provision, "CALIBRATION_TEXTS", 2)
    monkeypatch.setenv("STEERMOE_CACHE", str(tmp_path / "cache"))
    return TopicWish(("pirates at sea",), writing=SHORT)


def test_a_topic_is_built_calibrated_and_kept(wish, tiny_model, monkeypatch):
    shape, notes = tiny_model.shape, Notes()
    assert lacking_topics(shape, wish) == ["pirates at sea"]
    with pytest.raises(VectorNotFound, match=r"tiny-mixtral has no vector of the topic 'pirates at sea': without"):
        check_topics_there(shape, wish)
    given = provide_topics(tiny_model, wish, notes)
    path = kept_folder(shape) / "pirates-at-sea.safetensors"
    assert given == topic_files(shape, wish) == {"pirates-at-sea": path}
    vector = read_vector(path)
    assert vector.info.strength > 0
    assert vector.info.damage <= 1
    assert vector.info.created_by == topics.CREATED_BY
    assert path.with_name("pirates-at-sea.texts.jsonl").is_file()
    said = [line for line in notes.lines if "do little" not in line and "left out" not in line]
    assert "has no vector of 'pirates at sea': it writes 6 texts about it and 6 about other things" in said[0]
    assert str(path) in said[1]
    assert "--no-build" in said[1]
    assert len(said) == 2

    monkeypatch.setattr(topic_vectors, "_build", None)
    notes.lines.clear()
    assert provide_topics(tiny_model, replace(wish, topics=(" Pirates at  sea",)), notes) == given
    assert provide_topics(tiny_model, replace(wish, writing=Writing()), notes) == given
    assert not notes.lines
    check_topics_there(shape, wish)
    write_vector(replace(vector, info=replace(vector.info, strength=None)), path)
    provide_topics(tiny_model, wish, notes)
    assert notes.lines[0] == "steermoe: 'pirates at sea': measuring how strong its vector may be on tiny-mixtral"
    assert read_vector(path).info.strength == vector.info.strength


def test_damaged_files_and_those_of_others_are_built_again(wish, tiny_model, make_vector):
    (path,) = provide_topics(tiny_model, wish).values()
    kept = path.read_bytes()
    path.write_bytes(b"damaged")
    assert lacking_topics(tiny_model.shape, wish)
    provide_topics(tiny_model, wish)
    assert path.read_bytes() == kept
    write_vector(make_vector("pirates-at-sea"), path)
    assert lacking_topics(tiny_model.shape, wish)


def test_an_interruption_says_how_to_go_on(wish, tiny_model, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    notes = Notes()
    monkeypatch.setattr(topic_vectors, "calibrate_kept", interrupt)
    with pytest.raises(KeyboardInterrupt):
        provide_topics(tiny_model, wish, notes)
    assert notes.lines[-1] == "steermoe: what was written is kept; the same command resumes"


def test_each_language_has_its_folder(wish, tiny_model):
    english = wish.path(tiny_model.shape, "pirates at sea")
    russian = wish.path(tiny_model.shape, "пираты в море")
    assert english.parent == kept_folder(tiny_model.shape, "en")
    assert russian.parent == kept_folder(tiny_model.shape, "ru")
    assert replace(wish, language="ru").path(tiny_model.shape, "pirates at sea").parent == russian.parent
