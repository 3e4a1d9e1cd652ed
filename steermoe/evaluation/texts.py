"""The texts that an evaluation needs: openings to continue, texts of known domains, and lists of a domain's words.

Those in the package were written for this purpose: neither the default model's experts nor its vectors have seen any of
them. They are English; for another language or domain bring your own.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from steermoe.discovery.corpus import Corpus
from steermoe.errors import CorpusError
from steermoe.evaluation.words import without_forms_of

DATA = Path(__file__).parent / "data"
"""Texts (`DOMAIN.jsonl`) and word lists (`DOMAIN.txt`)."""
NEUTRAL = "neutral"
"""The label of texts that belong to no domain; damage is measured on them."""
NUM_OPENINGS = 50
LEAST_TEXTS = 8
"""The fewest texts that a domain needs, half to learn from and half to measure on."""


@dataclass(frozen=True)
class Labelled:
    """Texts of known domains, with their domains.

    Attributes:
        learn: for the classifier.
        measure: for everything that is measured on texts.
        word_lists: folder of the domains' word lists (see `domain_list`); None for the package's.
    """

    learn: tuple[tuple[str, str], ...]
    measure: tuple[tuple[str, str], ...]
    word_lists: Path | None = None

    def of(self, label: str) -> list[str]:
        """The texts of one domain to measure on."""
        return [text for text, found in self.measure if found == label]

    @property
    def labels(self) -> list[str]:
        return sorted({label for _, label in self.learn})


def packaged_texts() -> Labelled:
    """The package's own: texts written for the classifier to learn from, held-out stories to measure on."""
    from steermoe.models.default.stories import load_stories

    learn = [
        (record["text"], record["domain"])
        for path in sorted(DATA.glob("*.jsonl"))
        for record in map(json.loads, path.read_text(encoding="utf-8").splitlines())
    ]
    return Labelled(tuple(learn), tuple((story.rest, story.topic) for story in load_stories("heldout")))


def read_texts(corpus: Corpus, domains: Iterable[str]) -> Labelled:
    """A user's labelled corpus; every second text of each domain is for learning.

    Raises:
        CorpusError: a domain, or "neutral", has too few texts.
    """
    by_label: dict[str, list[str]] = {}
    for text in corpus:
        by_label.setdefault(text.label, []).append(text.text)
    for label in (*domains, NEUTRAL):
        found = len(by_label.get(label, ()))
        if found < LEAST_TEXTS:
            raise CorpusError(
                f"'{corpus.path}' has {found} texts labelled '{label}', {LEAST_TEXTS} are needed; labels are: "
                f"{', '.join(sorted(by_label))} (subfolders' names, or --label-field)"
            )
    pairs = {label: [(text, label) for text in texts] for label, texts in sorted(by_label.items()) if label}
    return Labelled(
        tuple(pair for own in pairs.values() for pair in own[::2]),
        tuple(pair for own in pairs.values() for pair in own[1::2]),
    )


def heldout_texts(domains: Iterable[str], corpus: Corpus | None = None) -> Labelled:
    """A user's labelled corpus as `read_texts` reads it, or the package's texts.

    Raises:
        CorpusError: there are none, or too few, of a domain.
    """
    if corpus is not None:
        return read_texts(corpus, domains)
    texts = packaged_texts()
    if unknown := [domain for domain in domains if domain not in texts.labels]:
        raise CorpusError(
            f"no held-out texts of '{unknown[0]}' came with steermoe (there are {', '.join(texts.labels)}): give "
            "labelled ones with --heldout"
        )
    return texts


def neutral_texts(corpus: Corpus | None = None) -> list[str]:
    """The texts of a user's corpus labelled neutral, or all where none is; the package's neutral ones without a corpus.

    Raises:
        CorpusError: the corpus can't be read, or holds no texts.
    """
    if corpus is None:
        return packaged_texts().of(NEUTRAL)
    texts = list(corpus)
    return [text.text for text in texts if text.label == NEUTRAL] or [text.text for text in texts]


def read_openings(path: Path) -> list[str]:
    """Openings from a file: one per line, or JSONL with a `prompt`.

    Raises:
        CorpusError: it can't be read, or has none.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"can't read openings from '{path}': {error}") from error
    openings = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        if path.suffix != ".jsonl":
            openings.append(line)
            continue
        try:
            opening = json.loads(line)["prompt"]
        except (ValueError, TypeError, KeyError) as error:
            raise CorpusError(f"'{path}' line {number} is not a JSON object with a prompt ({error!r})") from error
        if not isinstance(opening, str) or not opening.strip():
            raise CorpusError(f"'{path}' line {number}: its prompt is {opening!r}, expected text")
        openings.append(opening)
    if not openings:
        raise CorpusError(f"'{path}' contains no openings: write one per line, or JSONL with a prompt")
    return list(dict.fromkeys(openings))


def choose_openings(path: Path | None = None) -> list[str]:
    """Openings from a file, as `read_openings`, or the package's first 50 that no training saw."""
    from steermoe.models.default.stories import openings

    return openings("heldout", NUM_OPENINGS) if path is None else read_openings(path)


def domain_list(domain: str, without: Sequence[str] = (), folder: Path | None = None) -> list[str]:
    """The words typical of a domain, without the keywords of the vector itself; [] if there is no list.

    Args:
        domain: its name.
        without: words to leave out in any of their forms.
        folder: of `<domain>.txt` files, one word per line; by default the package's, from WordNet's topics.
    """
    path = (folder or DATA) / f"{domain}.txt"
    words = path.read_text(encoding="utf-8").split() if path.is_file() else []
    return without_forms_of(words, without)
