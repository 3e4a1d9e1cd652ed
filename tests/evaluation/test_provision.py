"""Vectors on demand: what is built, where it is kept, what an interruption costs, and which vector is taken."""

import multiprocessing
from dataclasses import replace

import pytest
import torch

import steermoe
from steermoe.discovery import embed_corpus, packaged, packaged_vectors
from steermoe.errors import CompatibilityError, ModelError, SteeringError, VectorError, VectorNotFound
from steermoe.evaluation import provision
from steermoe.evaluation.load_vector import load_vector
from steermoe.evaluation.provision import Wish, check_there, kept_folder, lacking, missing, provide
from steermoe.models.loading import LoadedModel
from steermoe.vectors.file import read_vector, write_vector

FEW = 3


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
def few_texts(monkeypatch, bare_search_path, tmp_path):
    """A few packaged texts of each domain, and folders of the test's own."""
    monkeypatch.setattr(packaged, "TEXTS", FEW)
    monkeypatch.setattr(packaged, "NEUTRAL_TEXTS", FEW)
    monkeypatch.setattr(packaged_vectors, "MAX_TOKENS", 60)
    monkeypatch.setattr(provision, "CALIBRATION_TEXTS", 2)
    monkeypatch.setenv("STEERMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_all_domains_are_built_and_the_one_asked_for_is_calibrated(few_texts, tiny_model):
    notes = Notes()
    assert lacking(tiny_model.shape, Wish(("sport", "chess"))) == ["sport"]
    given = provide(tiny_model, Wish(("sport", "chess")), notes)
    folder = kept_folder(tiny_model.shape)
    assert folder.is_relative_to(few_texts / "user-data")
    assert given == {"sport": folder / "sport.safetensors"}
    assert len(contents(folder)) == 8
    sport = read_vector(given["sport"])
    assert sport.info.strength > 0
    assert sport.info.damage <= 1
    assert sport.info.created_by == packaged.CREATED_BY
    assert (sport.info.texts, sport.info.model) == (FEW, "tiny-mixtral")
    assert sport.experts.any()
    assert read_vector(folder / "food.safetensors").info.strength is None
    assert not list((few_texts / "cache").rglob("*.npy"))
    assert not list(folder.glob(".*.json"))
    built, kept = [line for line in notes.lines if "do little" not in line]
    assert "no vector of 'sport': building those of 8 domains from 27 English texts (about " in built
    assert str(folder) in kept
    assert "--no-build" in kept


def test_a_second_domain_is_only_calibrated(few_texts, tiny_model, monkeypatch):
    provide(tiny_model, Wish(("sport",)))
    folder = kept_folder(tiny_model.shape)
    before = contents(folder)
    monkeypatch.setattr(packaged_vectors, "build_packaged", None)
    notes = Notes()
    provide(tiny_model, Wish(("food", "sport")), notes)
    after = contents(folder)
    assert {name for name in before if before[name] != after[name]} == {"food.safetensors"}
    assert "'food' of tiny-mixtral: measuring how strong it may be" in notes.lines[0]
    assert "--no-build" not in " ".join(notes.lines)
    notes.lines.clear()
    assert set(provide(tiny_model, Wish(("food", "sport")), notes)) == {"food", "sport"}
    assert not notes.lines


def test_the_same_weights_under_another_name_get_a_strength_too(few_texts, tiny_model):
    """A renamed folder, or a GGUF file: its vectors are found by their fingerprint, but most lack a strength."""
    provide(tiny_model, Wish(("sport",)))
    renamed = LoadedModel("renamed", tiny_model.model, tiny_model.tokenizer)
    assert lacking(renamed.shape, Wish(("sport", "food"))) == ["food"]
    assert lacking(renamed.shape, Wish(("sport", "food"), calibrated=False)) == []
    given = provide(renamed, Wish(("sport", "food")))
    assert given == {"food": kept_folder(renamed.shape) / "food.safetensors"}
    assert read_vector(given["food"]).info.strength is not None


def test_each_language_has_its_folder(few_texts, tiny_model):
    wish = Wish(("law",), "ru", calibrated=False)
    given = provide(tiny_model, wish)
    vector = read_vector(given["law"])
    assert given["law"].parent == kept_folder(tiny_model.shape, "ru") != kept_folder(tiny_model.shape)
    assert "Russian" in vector.info.title
    assert vector.info.strength is None
    assert missing(tiny_model.shape, Wish(("law",), "en")) == ["law"]
    assert not missing(tiny_model.shape, wish)
    assert lacking(tiny_model.shape, replace(wish, calibrated=True)) == ["law"]


def test_a_vector_of_the_users_own_comes_first(few_texts, tiny_model, make_vector, bare_search_path):
    own = bare_search_path / "steering_vectors" / "tiny" / "sport.safetensors"
    write_vector(make_vector("sport"), own)
    assert provide(tiny_model, Wish(("sport",), "ru")) == {}
    assert not kept_folder(tiny_model.shape, "ru").exists()
    stranger = replace(make_vector("food").info, model="tiny-other")
    write_vector(make_vector("food", info=stranger), own.with_name("food.safetensors"))
    assert lacking(tiny_model.shape, Wish(("sport", "food"))) == ["food"]
    assert lacking(tiny_model.shape, Wish(("sport", "food"), any_model=True)) == []


def test_embeddings_survive_an_interruption(few_texts, tiny_model, monkeypatch):
    reads = []

    class Interrupting:
        def __init__(self, embed, stops):
            self.embed, self.stops, self.shape = embed, stops, embed.shape

        def parts(self, texts, done=()):
            for number, part in enumerate(self.embed.parts(texts, done)):
                reads.append(part[0])
                yield part
                if self.stops and number == 1:
                    raise KeyboardInterrupt

    real = embed_corpus.embedder

    def build(stops):
        from contextlib import contextmanager

        @contextmanager
        def opened(loaded, options=None):
            with real(loaded, replace(options, batch_tokens=120)) as embed:
                yield Interrupting(embed, stops)

        monkeypatch.setattr(embed_corpus, "embedder", opened)
        return provide(tiny_model, Wish(("sport",), calibrated=False), notes)

    notes = Notes()
    with pytest.raises(KeyboardInterrupt):
        build(stops=True)
    assert "the same command resumes" in notes.lines[-1]
    assert not contents(kept_folder(tiny_model.shape))
    first = len(reads)
    build(stops=False)
    assert first == 2
    assert len({tuple(places) for places in reads}) == len(reads), "a batch was computed twice"


def test_measurements_survive_an_interruption(few_texts, tiny_model, monkeypatch):
    provide(tiny_model, Wish(("sport",), calibrated=False))
    path = kept_folder(tiny_model.shape) / "sport.safetensors"
    real, asked = provision.forcing_of, []

    def interrupted(source, texts):
        forcing = real(source, texts)

        class Forcing:
            def compare(self, plan):
                if len(asked) == 2:
                    asked.append(None)
                    raise KeyboardInterrupt
                asked.append(plan.strength)
                return forcing.compare(plan)

        return Forcing()

    monkeypatch.setattr(provision, "forcing_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        provide(tiny_model, Wish(("sport",)))
    assert read_vector(path).info.strength is None
    provide(tiny_model, Wish(("sport",)))
    strengths = [strength for strength in asked if strength is not None]
    assert len(set(strengths)) == len(strengths), "a strength was measured twice"
    calibrated = read_vector(path)
    path.unlink()
    monkeypatch.setattr(provision, "forcing_of", real)
    provide(tiny_model, Wish(("sport",)))
    assert read_vector(path).info == calibrated.info


def test_damaged_or_foreign_measurements_are_measured_again(few_texts, tiny_model):
    provide(tiny_model, Wish(("sport",), calibrated=False))
    path = kept_folder(tiny_model.shape) / "sport.safetensors"
    uncalibrated, measured = path.read_bytes(), path.with_name(".sport.measured.json")
    provide(tiny_model, Wish(("sport",)))
    expected = read_vector(path).info
    for text in ("{", '{"of": 1}', '{"of": "x", "measured": {"2": [9.5, 0.5]}}'):
        path.write_bytes(uncalibrated)
        measured.write_text(text)
        provide(tiny_model, Wish(("sport",)))
        assert read_vector(path).info == expected
        assert not measured.exists()


def test_a_damaged_vector_is_built_again(few_texts, tiny_model):
    provide(tiny_model, Wish(("sport",), calibrated=False))
    folder = kept_folder(tiny_model.shape)
    before = contents(folder)
    (folder / "sport.safetensors").write_bytes(b"\x00" * 40)
    provide(tiny_model, Wish(("sport",), calibrated=False))
    assert contents(folder) == before


def _hold(folder, is_held, may_end):
    with provision.alone_in(folder):
        is_held.set()
        may_end.wait(20)


def test_two_processes_take_turns(tmp_path):
    context = multiprocessing.get_context("fork")
    is_held, may_end = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "kept", is_held, may_end))
    other.start()
    assert is_held.wait(20)
    notes = Notes()
    notes.note = lambda text, style="": (notes.lines.append(text), may_end.set())
    with provision.alone_in(tmp_path / "kept", notes):
        assert "waiting" in notes.lines[0]
    other.join(20)
    assert other.exitcode == 0


def test_a_folder_that_cannot_be_written(few_texts, tiny_model, tmp_path):
    (tmp_path / "user-data").write_text("a file")
    with pytest.raises(VectorError, match=r"can't write to .*XDG_DATA_HOME"):
        provide(tiny_model, Wish(("sport",)))


def test_no_build_names_the_fix(few_texts, tiny_model, make_vector, bare_search_path):
    with pytest.raises(VectorNotFound, match=r"no vector 'sport'.*without --no-build"):
        check_there(tiny_model.shape, Wish(("sport",)))
    path = bare_search_path / "steering_vectors" / "other" / "sport.safetensors"
    write_vector(make_vector("sport", info=replace(make_vector().info, model="other")), path)
    with pytest.raises(CompatibilityError, match=r"built for other.*without --no-build"):
        check_there(tiny_model.shape, Wish(("sport",)))
    check_there(tiny_model.shape, Wish(("sport",), any_model=True))
    check_there(tiny_model.shape, Wish(("chess",)))


def test_a_model_that_treats_all_texts_alike(few_texts, tiny_model):
    alike = replace_frequency(tiny_model, torch.full((8, 3, 8), 1 / 8))
    with pytest.raises(VectorError, match="routers treat texts of 'biology' like all others"):
        packaged_vectors.vectors_of(tiny_model, alike)


def replace_frequency(model, frequency_BLN):
    from steermoe.discovery.store import EmbeddedTexts, Text

    domains = list(packaged.packaged_texts())[: len(frequency_BLN)]
    texts = [Text(domain, f"about {domain}", domain) for domain in domains]
    tokens = torch.ones(len(texts), dtype=torch.int64).numpy()
    meta = embed_corpus.meta_of(model, embed_corpus.EmbeddingOptions())
    return EmbeddedTexts(meta, texts, tokens, frequency_BLN.numpy())


def test_the_threshold_is_lowered_until_the_vector_steers(tiny_model):
    frequency, remarks = torch.full((8, 3, 8), 1 / 8), []

    def made():
        embedded = replace_frequency(tiny_model, normal(frequency))
        return packaged_vectors.vectors_of(tiny_model, embedded, on_remark=remarks.append)

    frequency[0, :, 0] *= 1.3
    weak = made()[0]
    assert (weak.threshold, weak.experts[:, 0].all(), weak.experts[:, 1:].any()) == (1.1, True, False)
    assert "may do little" in remarks[0]
    remarks.clear()
    for place in range(8):
        frequency[place, :, place] = 0.6
    vectors = made()
    assert [int(vector.experts[0].argmax()) for vector in vectors] == list(range(8))
    assert all((vector.experts > 0).any(-1).all() for vector in vectors)
    assert not remarks


def normal(frequency):
    return frequency / frequency.sum(-1, keepdim=True)


def test_a_vector_that_does_nothing_is_an_error(few_texts, tiny_model, monkeypatch):
    def refuse(*arguments, **options):
        raise SteeringError("vector 'sport' does nothing")

    monkeypatch.setattr(provision, "calibrate_vector", refuse)
    with pytest.raises(SteeringError, match="does nothing"):
        provide(tiny_model, Wish(("sport",)))


def test_kept_folders_have_harmless_names(tiny_model):
    shape = replace(tiny_model.shape, name="acme/../we ird\n", fingerprint="0123456789abcdef")
    assert kept_folder(shape, "both").name == "we-ird--0123456789abcdef-both"


# ---- load_vector ----


def test_load_vector_builds(few_texts, tiny_model, tiny_checkpoint):
    with pytest.raises(VectorNotFound):
        steermoe.load_vector("sport", tiny_model.model)
    vector = steermoe.load_vector("sport", tiny_model.model, build=True)
    assert vector.info.strength > 0
    assert steermoe.load_vector("sport", tiny_model).experts.equal(vector.experts)
    assert steermoe.load_vector("sport", steermoe.HFEngine(tiny_model), build=True).info == vector.info
    assert load_vector("law", tiny_model, build=True, language="ru").info.title.endswith("Russian texts")


def test_load_vector_needs_something_to_build_with(few_texts, tiny_model, monkeypatch):
    with pytest.raises(ModelError, match="needs a model, not RoutingShape"):
        load_vector("sport", tiny_model.shape, build=True)
    with pytest.raises(ModelError, match="needs a model, not NoneType"):
        load_vector("sport", build=True)
    monkeypatch.setattr(tiny_model.model, "name_or_path", str(few_texts))
    with pytest.raises(ModelError, match="no tokenizer at"):
        load_vector("sport", tiny_model.model, build=True)
    monkeypatch.setattr(tiny_model.model, "name_or_path", "")
    with pytest.raises(ModelError, match="no tokenizer at"):
        load_vector("sport", tiny_model.model, build=True)
