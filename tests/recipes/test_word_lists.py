"""Word lists from WordNet: the packaged ones, and making them from a tiny database in the real format."""

import itertools

import pytest

from recipes.word_lists import Domain, below, domain_lemmas, find_synset, make_lists, read_wordnet
from steermoe.evaluation.texts import DATA, domain_list
from steermoe.evaluation.words import word_pattern
from steermoe.models.default import spec
from steermoe.models.default.stories import domain_words, load_stories

LISTS = {domain: (DATA / f"{domain}.txt").read_text().split() for domain in spec.DOMAINS}
EVERYDAY = {"run", "sun", "dog", "house", "hand", "time", "water", "door", "people", "day", "letter", "boy", "road"}


@pytest.mark.parametrize("domain", spec.DOMAINS)
def test_lists_do_not_contain_the_vectors_keywords(domain):
    words = LISTS[domain]
    assert 20 <= len(words) == len(set(words)) <= 300
    assert all(word.isalpha() and word.islower() and len(word) >= 3 for word in words)
    assert not [word for word in words if word_pattern(domain_words(domain)).fullmatch(word)]
    assert domain_list(domain) == words


def test_no_word_is_in_two_lists_or_an_everyday_one():
    for first, second in itertools.combinations(LISTS.values(), 2):
        assert not set(first) & set(second)
    assert not EVERYDAY & {word for words in LISTS.values() for word in words}


def test_neutral_stories_contain_none():
    pattern = word_pattern(word for words in LISTS.values() for word in words)
    assert not [story.id for story in load_stories(topic="neutral") if pattern.search(story.text.lower())]


# ---- how they are made ----

DATA = """  1 A licence stands first, in lines that begin with two spaces.
00000010 04 n 01 sport 0 002 -c 00000020 n 0000 ~ 00000030 n 0000 | an active diversion; "tennis is a sport"
00000020 04 n 02 serve 0 service 0 001 ;c 00000010 n 0000 | a stroke that puts the ball into play
00000030 04 n 01 tennis 0 002 @ 00000010 n 0000 ~ 00000040 n 0000 | a game with rackets, as tennis players say
00000040 04 n 02 Wimbledon 0 lawn_tennis 0 001 @ 00000030 n 0000 | tennis on grass, no sport for rain
00000050 04 n 01 service 0 000 | work for others, such as a service
"""
INDEX = """  1 A licence.
sport n 1 2 -c ~ 1 1 00000010
serve n 1 1 ;c 1 1 00000020
service n 2 1 ;c 2 2 00000050 00000020
tennis n 1 2 @ ~ 1 1 00000030
wimbledon n 1 1 @ 1 0 00000040
"""
TAGS = "service%1:04:00:: 1 9\nservice%1:04:01:: 2 3\ntennis%1:04:00:: 1 4\n"


@pytest.fixture
def wordnet(tmp_path):
    for name in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{name}").write_text(DATA if name == "noun" else "")
        (tmp_path / f"index.{name}").write_text(INDEX if name == "noun" else "")
    (tmp_path / "cntlist.rev").write_text(TAGS)
    return read_wordnet(tmp_path)


def test_the_files_are_read(wordnet):
    assert find_synset(wordnet, "service.n.2") == ("n", "00000020")
    assert below(wordnet, ["sport.n.1"]) == {("n", f"000000{number}0") for number in (1, 3, 4)}
    assert wordnet.tags["service", "n", 1] == 9
    assert wordnet.mentions["tennis"] == 3


def test_members_of_a_topic_and_synsets_below_a_root(wordnet):
    assert domain_lemmas(wordnet, Domain(("sport.n.1",), ())) == ["serve"]  # "service" is mostly something else
    assert domain_lemmas(wordnet, Domain((), ("sport.n.1",))) == ["sport", "tennis"]  # no names, no word pairs


def test_lists_leave_out_keywords_and_common_words(wordnet):
    domains = {"sport": Domain(("sport.n.1",), ("sport.n.1",))}
    assert make_lists(wordnet, domains, {}, []) == {"sport": ["tennis", "sport"]}
    assert make_lists(wordnet, domains, {"sport": ["sports"]}, ["tennis"]) == {"sport": ["sport"]}
    assert make_lists(wordnet, domains, {"sport": ["sport"]}, []) == {"sport": ["tennis"]}
