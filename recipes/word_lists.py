"""Make the domains' word lists from WordNet 3.0.

    python -m recipes.word_lists --dict /usr/share/wordnet -o steermoe/evaluation/data

The lists measure how much a text is about a domain. They do not depend on our own stories, except that words of neutral
texts and openings are left out as too common. Debian's `wordnet-base` has the files (format: wndb(5WN)); only this
script needs it. Licence: nothing is copied from WordNet, neither definitions nor files; the lists only use facts: which
words belong to which topic. Its licence would permit more (WordNet 3.0, Princeton University).

A sense belongs to a domain if WordNet gives it one of the domain's topics or puts it below one of the domain's roots. A
word belongs to the domain if that sense is its most frequent one in WordNet's tagged texts, apart from proper names.
Dropped are the vectors' own keywords, words of two domains, and forms of common words; the best known words remain, by
how often WordNet's tagged texts contain them and its definitions mention them. Software and space keep few words: their
best ones are keywords.
"""

import argparse
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from steermoe.evaluation.words import without_forms_of

Key = tuple[str, str]
"""A synset: the part of speech (n, v, a, r) and the offset in its data file."""

FILES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
TAGGED = {"1": "n", "2": "v", "3": "a", "4": "r", "5": "a"}
"""Part of speech by the digit in a sense key."""
LONGEST_LIST = 300
LEAST_KNOWN = 2
"""The fewest taggings and mentions of a word; rarer ones are terms that occur in no simple story."""


@dataclass(frozen=True)
class Domain:
    """Where a domain's words are in WordNet; a synset is named by lemma, part of speech and number of the sense.

    Attributes:
        topics: synsets with one of these topics, or with one below them, belong to the domain.
        roots: so do synsets below these.
    """

    topics: tuple[str, ...]
    roots: tuple[str, ...]


@dataclass(frozen=True)
class Synset:
    """Lemmas as written, pointers as symbol and target."""

    lemmas: tuple[str, ...]
    pointers: tuple[tuple[str, Key], ...]


@dataclass(frozen=True)
class WordNet:
    """The parts of the database that are used.

    Attributes:
        synsets: by key.
        senses: by lemma in lower case and part of speech, in WordNet's order.
        tags: how often tagged texts contain a lemma, part of speech and number of the sense.
        mentions: how many definitions and examples contain a word.
    """

    synsets: Mapping[Key, Synset]
    senses: Mapping[tuple[str, str], tuple[Key, ...]]
    tags: Mapping[tuple[str, str, int], int]
    mentions: Mapping[str, int]


DOMAINS: dict[str, Domain] = {
    "biology": Domain(
        topics=(
            "biology.n.1",
            "botany.n.2",
            "animal.n.1",
            "plant.n.2",
            "bird.n.1",
            "mammal.n.1",
            "genetics.n.1",
            "zoology.n.2",
            "microbiology.n.1",
            "taxonomy.n.2",
            "ornithology.n.1",
            "entomology.n.1",
        ),
        roots=(
            "animal.n.1",
            "plant.n.2",
            "microorganism.n.1",
            "fungus.n.1",
            "plant_part.n.1",
            "biologist.n.1",
            "organelle.n.1",
            "biology.n.1",
            "biological_process.n.1",
            "biological_group.n.1",
            "body_covering.n.1",
            "animal_tissue.n.1",
        ),
    ),
    "food": Domain(
        topics=("cooking.n.1",),
        roots=(
            "food.n.1",
            "food.n.2",
            "beverage.n.1",
            "cooking_utensil.n.1",
            "kitchen_utensil.n.1",
            "tableware.n.1",
            "cook.n.1",
            "cook.v.3",
            "cook.v.2",
            "cooking.n.1",
            "kitchen_appliance.n.1",
            "restaurant.n.1",
            "eater.n.1",
            "cutlery.n.2",
            "eat.v.1",
        ),
    ),
    "law": Domain(
        topics=("law.n.1", "crime.n.1", "criminal_law.n.1", "civil_law.n.1", "contract.n.1"),
        roots=(
            "crime.n.1",
            "lawyer.n.1",
            "legal_document.n.1",
            "law.n.1",
            "judge.n.1",
            "court.n.1",
            "criminal.n.1",
            "lawman.n.1",
            "legal_proceeding.n.1",
            "lawsuit.n.1",
            "due_process.n.1",
            "correctional_institution.n.1",
            "defendant.n.1",
            "litigant.n.1",
            "pleading.n.1",
            "legal_right.n.1",
            "jurisprudence.n.1",
            "prisoner.n.1",
            "legal_action.n.1",
        ),
    ),
    "medicine": Domain(
        topics=(
            "medicine.n.1",
            "medicine.n.3",
            "medical_science.n.1",
            "surgery.n.1",
            "pathology.n.1",
            "medicine.n.2",
            "psychiatry.n.1",
            "dentistry.n.1",
        ),
        roots=(
            "ill_health.n.1",
            "medicine.n.2",
            "health_professional.n.1",
            "medical_procedure.n.1",
            "medical_building.n.1",
            "sick_person.n.1",
            "patient.n.1",
            "symptom.n.1",
            "medical_instrument.n.1",
            "injury.n.1",
            "medical_science.n.1",
            "internal_organ.n.1",
            "bone.n.1",
            "medical_care.n.1",
            "treat.v.3",
            "hospital.n.1",
            "dressing.n.3",
            "medical_center.n.1",
            "joint.n.1",
            "pain.n.1",
        ),
    ),
    "music": Domain(
        topics=("music.n.1", "music.n.3", "music.n.4", "music.n.2", "opera.n.1", "singing.n.1"),
        roots=(
            "music.n.1",
            "musical_instrument.n.1",
            "musician.n.1",
            "musician.n.2",
            "music.n.3",
            "sing.v.2",
            "musical_organization.n.1",
            "musical_notation.n.1",
            "note.n.5",
            "musical_time.n.1",
            "play.v.3",
            "play.v.7",
            "play.v.6",
        ),
    ),
    "software": Domain(
        topics=("computer_science.n.1", "computer.n.1", "internet.n.1", "software.n.1", "artificial_intelligence.n.1"),
        roots=(
            "software.n.1",
            "computer.n.1",
            "computer_user.n.1",
            "computer_circuit.n.1",
            "peripheral.n.1",
            "computer_network.n.1",
            "programming_language.n.1",
            "web_site.n.1",
            "computer_file.n.1",
            "computer_science.n.1",
            "programming.n.2",
            "data_structure.n.1",
            "computer_memory.n.1",
        ),
    ),
    "space": Domain(
        topics=(
            "astronomy.n.1",
            "astronautics.n.1",
            "spaceflight.n.1",
            "cosmology.n.2",
            "astrophysics.n.1",
            "rocket.n.1",
            "radio_astronomy.n.1",
            "spacecraft.n.1",
        ),
        roots=(
            "celestial_body.n.1",
            "spacecraft.n.1",
            "telescope.n.1",
            "rocket.n.1",
            "rocket.n.2",
            "astronomer.n.1",
            "astronaut.n.1",
            "space.n.4",
            "star.n.1",
            "planet.n.1",
            "galaxy.n.3",
            "astronomy.n.1",
            "satellite.n.1",
        ),
    ),
    "sport": Domain(
        topics=("sport.n.1", "athletic_game.n.1", "game.n.1"),
        roots=(
            "sport.n.1",
            "athlete.n.1",
            "player.n.1",
            "sports_equipment.n.1",
            "contest.n.1",
            "contestant.n.1",
            "stadium.n.1",
            "playing_field.n.1",
            "athletic_facility.n.1",
            "athletic_contest.n.1",
            "coach.n.1",
            "score.n.3",
            "athletic_game.n.1",
            "gymnastic_apparatus.n.1",
        ),
    ),
}


def read_wordnet(folder: Path) -> WordNet:
    """Read the database's files."""
    synsets: dict[Key, Synset] = {}
    senses: dict[tuple[str, str], tuple[Key, ...]] = {}
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
    return WordNet(synsets, senses, _read_tags(folder / "cntlist.rev"), mentions)


def _lines(path: Path) -> list[str]:
    # The licence comes first, in lines that begin with spaces.
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
    """The synset with a name such as "law.n.1"."""
    lemma, speech, number = name.rsplit(".", 2)
    return wordnet.senses[lemma, speech][int(number) - 1]


def below(wordnet: WordNet, names: Iterable[str]) -> set[Key]:
    """The synsets with these names and all their hyponyms, without instances, which have proper names."""
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
    return members | below(wordnet, domain.roots)


def sense_ranks(wordnet: WordNet, word: str) -> list[tuple[int, Key]]:
    """A word's senses in all parts of speech with their taggings, the most frequent first, without proper names."""
    ranks = []
    for speech in FILES:
        for number, key in enumerate(wordnet.senses.get((word, speech), ()), 1):
            if word in wordnet.synsets[key].lemmas:
                ranks.append((wordnet.tags.get((word, speech, number), 0), key))
    return sorted(ranks, key=lambda rank: -rank[0])


def domain_lemmas(wordnet: WordNet, domain: Domain) -> list[str]:
    """Single words whose most frequent sense belongs to the domain."""
    found = set()
    for key in domain_synsets(wordnet, domain):
        for word in wordnet.synsets[key].lemmas:
            if re.fullmatch("[a-z]{3,}", word):
                ranks = sense_ranks(wordnet, word)
                if any(found_key == key and tags >= ranks[0][0] for tags, found_key in ranks):
                    found.add(word)
    return sorted(found)


def familiarity(wordnet: WordNet, word: str) -> int:
    """How often tagged texts contain a word and definitions mention it."""
    return sum(tags for tags, _ in sense_ranks(wordnet, word)) + wordnet.mentions.get(word, 0)


def make_lists(
    wordnet: WordNet, domains: Mapping[str, Domain], keywords: Mapping[str, Sequence[str]], common: Iterable[str]
) -> dict[str, list[str]]:
    """One list per domain, the best known words first.

    Args:
        wordnet: the database.
        domains: where their words are.
        keywords: words by domain to leave out of all lists, in any of their forms.
        common: words to leave out as too common, in any of their forms.
    """
    lemmas = {name: domain_lemmas(wordnet, domain) for name, domain in domains.items()}
    counts = Counter(word for words in lemmas.values() for word in words)
    taken = [word for words in keywords.values() for word in words]
    usual = set(common)
    lists = {}
    for name, words in lemmas.items():
        own = [word for word in without_forms_of(words, taken) if counts[word] == 1]
        rare = [word for word in own if not any(word + ending in usual for ending in ("", "s", "es", "d", "ed", "ing"))]
        known = {word: familiarity(wordnet, word) for word in rare}
        best = sorted((word for word in rare if known[word] >= LEAST_KNOWN), key=lambda word: -known[word])
        lists[name] = best[:LONGEST_LIST]
    return lists


def main() -> None:
    from steermoe.models.default.stories import domain_words, load_stories

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dict", type=Path, default=Path("/usr/share/wordnet"), help="folder with WordNet's files")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    common = " ".join(story.text if story.topic == "neutral" else story.opening for story in load_stories())
    lists = make_lists(
        read_wordnet(args.dict),
        DOMAINS,
        {name: domain_words(name) for name in DOMAINS},
        re.findall(r"[a-z]+", common.lower()),
    )
    args.output.mkdir(parents=True, exist_ok=True)
    for name, words in lists.items():
        (args.output / f"{name}.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
