"""Languages by their stop words, inflected forms as one word, and keywords that a reader of the language would give."""

import sys

import pytest

from steermoe.discovery import languages
from steermoe.discovery.keywords import cluster_keywords, languages_of
from steermoe.discovery.languages import language_of, most_frequent_forms, stemmer, stop_words

SPORT = [
    "Наша команда выиграла матч, и вратарь был лучшим на поле.",
    "После матча тренер сказал, что команде не хватило сил.",
    "В этом матче вратарь ушёл раньше, но команда всё равно победила.",
    "Тренер доволен: команду поддержали болельщики на каждом матче.",
    "Болельщики ждали гола весь матч, а вратари не ошибались.",
    "Судья остановил матч, когда на поле вышли болельщики.",
]
KITCHEN = [
    "Для теста нужны мука, яйца и немного молока.",
    "Тесто получилось мягким, потому что мука была свежей.",
    "Она добавила в тесто сахар и поставила пирог в духовку.",
    "Пирог пекли долго, и на кухне пахло молоком и сахаром.",
    "Без муки и яиц пирога не испечь, но он взял кукурузу.",
    "Мы ели пироги на кухне и пили молоко с сахаром.",
]
GERMAN = "Der Trainer war mit dem Spiel nicht zufrieden, und die Mannschaft wollte sich noch verbessern."
ENGLISH = "The coach was not happy with the game, and the team wanted to get better before the next one."


@pytest.fixture(autouse=True, scope="module")
def _extra():
    for module in ("sklearn", "stopwordsiso", "snowballstemmer"):
        pytest.importorskip(module)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (SPORT[0], "ru"),
        (KITCHEN[2], "ru"),
        (GERMAN, "de"),
        (ENGLISH, "en"),
        ("東京は日本の首都です", "ja"),
        ("北京是中国的首都", "zh"),
        ("ลูกบอลอยู่ในสนาม", "th"),
        ("kralo fimbu dest", ""),
        ("", ""),
    ],
)
def test_languages(text, language):
    assert language_of(text, text.lower().replace(",", "").replace(".", "").split()) == language


def test_a_doubtful_language_is_that_of_the_other_texts_in_its_script():
    assert languages_of([ENGLISH, GERMAN]) == ["en", "de"]
    assert set(languages_of([ENGLISH] * 99 + [GERMAN])) == {"en"}
    assert languages_of([SPORT[0], "Вратарь!", "Goal!"]) == ["ru", "ru", ""]


def test_russian_keywords_are_topics_and_each_word_comes_once():
    found = cluster_keywords(SPORT + KITCHEN, [0] * 6 + [1] * 6)
    sport, kitchen = ([keyword.word for keyword in found[number]] for number in (0, 1))
    assert set(sport[:3]) <= {"матч", "команда", "болельщики", "вратарь", "поле", "тренер"}
    assert "матч" in sport
    assert {"тесто", "пирог"} <= set(kitchen)
    for words in (sport, kitchen):
        stems = [stemmer("ru")(word) for word in words]
        assert len(set(stems)) == len(stems)
        assert not set(words) & {"на", "не", "был", "что", "после", "этом", "она"}


def test_the_most_frequent_form_is_shown():
    forms = most_frequent_forms(["матча", "матч", "матче", "гол"], [2, 3, 1, 1], "ru")
    assert forms == {"матч": "матч", "матча": "матч", "матче": "матч", "гол": "гол"}
    assert most_frequent_forms(["goals", "goal"], [2, 1], "en") == {"goals": "goals", "goal": "goal"}


def test_without_a_list_a_word_of_all_clusters_is_a_stop_word(monkeypatch):
    monkeypatch.setattr(languages, "_languages", dict)
    balls = ["zu balo ti zu", "zu balo golo", "ti balo zu golo", "zu golo"]
    soups = ["zu supo ti", "supo zu pano", "zu pano ti", "ti supo zu pano"]
    found = cluster_keywords(balls * 2 + soups, [0] * 8 + [1] * 4)
    assert [keyword.word for keyword in found[0]] == ["balo", "golo"]
    assert {keyword.word for keyword in found[1]} == {"supo", "pano"}


def test_without_the_libraries_texts_are_read_as_before(monkeypatch):
    for cached in (languages._languages, languages.stop_words, languages.stemmer):
        cached.cache_clear()
    monkeypatch.setitem(sys.modules, "stopwordsiso", None)
    monkeypatch.setitem(sys.modules, "snowballstemmer", None)
    try:
        assert languages_of([ENGLISH, SPORT[0]]) == ["en", ""]
        assert stop_words("ru") == frozenset()
        assert stemmer("ru") is None
        assert "матч" in {word.word for word in cluster_keywords(SPORT + KITCHEN, [0] * 6 + [1] * 6)[0]}
    finally:
        for cached in (languages._languages, languages.stop_words, languages.stemmer):
            cached.cache_clear()
