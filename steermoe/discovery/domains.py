"""The texts of known domains, from a corpus for each or from one whose texts have labels."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steermoe.discovery.corpus import Corpus
from steermoe.discovery.store import Text
from steermoe.errors import CorpusError

MAX_LABELS = 8
"""The most labels that the message about a missing domain names."""


def read_domains(
    sources: Mapping[str, Path],
    against: Path | None = None,
    *,
    text_field: str = "text",
    label_field: str | None = None,
    include: Sequence[str] = (),
    encoding: str | None = None,
    on_read: Callable[[Corpus], None] = lambda corpus: None,
) -> tuple[dict[str, list[str]], list[str]]:
    """Each domain's texts, and the others. A path that is named several times is read once.

    Args:
        sources: domain -> where its texts are.
        against: where other texts are.
        text_field: the field or column with the text.
        label_field: take only records in which this field is the domain's name; of the others, those of no domain.
        include: as for `Corpus`.
        encoding: as for `Corpus`.
        on_read: called with each corpus that was read, to tell of its problems.

    Raises:
        CorpusError: one can't be read, or holds no text of the label that is wanted.
    """
    places = [*sources.values(), *([against] if against is not None else [])]
    fields: dict[str, Any] = {"text_field": text_field, "label_field": label_field}
    corpora = {place: Corpus(place, **fields, include=include, encoding=encoding) for place in places}
    read = {place: list(corpus) for place, corpus in corpora.items()}
    for corpus in corpora.values():
        on_read(corpus)
    if label_field is None:
        texts = {place: [text.text for text in found] for place, found in read.items()}
        return {domain: texts[place] for domain, place in sources.items()}, texts[against] if against else []
    own = {domain: _of_label(place, read[place], label_field, domain) for domain, place in sources.items()}
    return own, _of_no_domain(against, read[against], label_field, list(sources)) if against else []


def _of_label(path: Path, texts: list[Text], label_field: str, domain: str) -> list[str]:
    if found := [text.text for text in texts if text.label.lower() == domain]:
        return found
    labels = sorted({text.label for text in texts})
    more = ", ..." if len(labels) > MAX_LABELS else ""
    raise CorpusError(
        f"'{path}' has no text whose '{label_field}' is '{domain}', there are "
        f"{', '.join(map(repr, labels[:MAX_LABELS]))}{more}: name the domain as one of them, or leave out --label-field"
    )


def _of_no_domain(path: Path, texts: list[Text], label_field: str, domains: list[str]) -> list[str]:
    if found := [text.text for text in texts if text.label.lower() not in domains]:
        return found
    raise CorpusError(f"--against '{path}' has only texts whose '{label_field}' is {', '.join(domains)}: give others")
