"""Make the domains' word lists from WordNet 3.0.

    python -m steermoe.evaluation.wordnet --dict /usr/share/wordnet -o steermoe/evaluation/words

The lists tell how much a text is about a domain. They owe nothing to our own stories, except that a word of a neutral
text or of an opening is left out as too common. Debian's `wordnet-base` has the files (their format: wndb(5WN)) and is
needed only to make the lists. Licence: nothing of WordNet's is copied, neither a definition nor a file; what is taken
are facts, namely which words belong to which topic. Its licence would permit more (WordNet 3.0, Princeton University).

A sense is of a domain if WordNet gives it one of the domain's topics or puts it below one of the domain's roots. A word
is of the domain if none of its senses, proper names aside, was met more often in WordNet's tagged texts; among senses
that were never met, the first counts. Then go words of the vectors' own keywords, of two domains, and inflected forms of
common words; the best known remain, by how often WordNet's tagged texts have them and its definitions mention them.
"""

import argparse
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from steermoe.words import distinct_words, without_forms_of, word_pattern

Key = tuple[str, str]
"""A synset: the part of speech (n, v, a, r) and the offset in its data file."""

FILES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
TAGGED = {"1": "n", "2": "v", "3": "a", "4": "r", "5": "a"}
"""Part of speech by the digit in a sense key."""
LONGEST_LIST = 300
LEAST_KNOWN = 2
"""Taggings and mentions of a word at least; those below are terms that no simple story has."""


@dataclass(frozen=True)
class Domain:
    """Where a domain's words are in WordNet; a synset is named by lemma, part of speech and number of the sense.

    Attributes:
        topics: what is given one of these topics, or one below it, belongs to the domain.
        roots: so does what lies below these.
        not_below: but not what lies below these.
        without: words that are wrong all the same.
    """

    topics: tuple[str, ...]
    roots: tuple[str, ...]
    not_below: tuple[str, ...] = ()
    without: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Synset:
    """Lemmas as written, pointers as symbol and target."""

    lemmas: tuple[str, ...]
    pointers: tuple[tuple[str, Key], ...]


@dataclass(frozen=True)
class WordNet:
    """What is read of the database.

    Attributes:
        synsets: by key.
        senses: of a lemma in small letters and a part of speech, the first sense first.
        tags: how often a lemma's sense of that number was met in tagged texts.
        bases: irregular forms, each with part of speech and base form.
        mentions: how many definitions and examples hold a word.
    """

    synsets: Mapping[Key, Synset]
    senses: Mapping[tuple[str, str], tuple[Key, ...]]
    tags: Mapping[tuple[str, str, int], int]
    bases: Mapping[str, tuple[tuple[str, str], ...]]
    mentions: Mapping[str, int]


DOMAINS: dict[str, Domain] = {}


def read_wordnet(folder: Path) -> WordNet:
    """Read the database's files; those of irregular forms (`*.exc`) may be absent."""
    synsets: dict[Key, Synset] = {}
    senses: dict[tuple[str, str], tuple[Key, ...]] = {}
    bases: dict[str, tuple[tuple[str, str], ...]] = {}
    mentions: Counter[str] = Counter()
    for speech, name in FILES.items():
        for line in _lines(folder / f"data.{name}"):
            fields, _, gloss = line.partition(" | ")
            offset, synset = _parse_synset(fields.split())
            synsets[speech, offset] = synset
            mentions.update(set(re.findall(r"[a-z]+", gloss.lower())))
        for line in _lines(folder / f"index.{name}"):
            lemma, _, count, *rest = line.split()
            senses[lemma, speech] = tuple((speech, offset) for offset in rest[-int(count) :])
        if (folder / f"{name}.exc").is_file():
            for line in _lines(folder / f"{name}.exc"):
                form, *found = line.split()
                bases[form] = (*bases.get(form, ()), *((base, speech) for base in found))
    return WordNet(synsets, senses, _read_tags(folder / "cntlist.rev"), bases, mentions)


def _lines(path: Path) -> list[str]:
    # The licence stands first, in lines that begin with spaces.
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("  ")]


def _parse_synset(fields: list[str]) -> tuple[str, Synset]:
    words = int(fields[3], 16)
    # An adjective's lemma may carry its position, such as "afloat(p)".
    lemmas = tuple(re.sub(r"\(.*\)$", "", lemma) for lemma in fields[4 : 4 + 2 * words : 2])
    start = 5 + 2 * words
    pointers = (fields[i : i + 3] for i in range(start, start + 4 * int(fields[start - 1]), 4))
    return fields[0], Synset(lemmas, tuple((symbol, (speech, offset)) for symbol, offset, speech in pointers))


def _read_tags(path: Path) -> dict[tuple[str, str, int], int]:
    tags: dict[tuple[str, str, int], int] = {}
    for line in _lines(path):
        sense_key, number, count = line.split()
        lemma, _, rest = sense_key.partition("%")
        tags[lemma, TAGGED[rest[0]], int(number)] = int(count)
    return tags


def find_synset(wordnet: WordNet, name: str) -> Key:
    """The synset of a name such as "law.n.1"."""
    lemma, speech, number = name.rsplit(".", 2)
    return wordnet.senses[lemma, speech][int(number) - 1]


def below(wordnet: WordNet, names: Iterable[str]) -> set[Key]:
    """The synsets of these names with all their hyponyms; instances, which have proper names, are no hyponyms."""
    found: set[Key] = set()
    waiting = [find_synset(wordnet, name) for name in names]
    while waiting:
        key = waiting.pop()
        if key not in found:
            found.add(key)
            waiting.extend(_targets(wordnet, key, "~"))
    return found


def _targets(wordnet: WordNet, key: Key, symbol: str) -> list[Key]:
    return [target for found, target in wordnet.synsets[key].pointers if found == symbol]


def domain_synsets(wordnet: WordNet, domain: Domain) -> set[Key]:
    """The synsets of a domain."""
    members = {member for topic in below(wordnet, domain.topics) for member in _targets(wordnet, topic, "-c")}
    return (members | below(wordnet, domain.roots)) - below(wordnet, domain.not_below)


def sense_ranks(wordnet: WordNet, word: str) -> list[tuple[int, Key]]:
    """A word's senses of all parts of speech with their taggings, the commonest first; proper names are left out."""
    ranks = []
    for speech in FILES:
        for number, key in enumerate(wordnet.senses.get((word, speech), ()), 1):
            if word in wordnet.synsets[key].lemmas:
                ranks.append((wordnet.tags.get((word, speech, number), 0), key))
    return sorted(ranks, key=lambda rank: -rank[0])
