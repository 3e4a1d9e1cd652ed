"""`steermoe vectors build`: builds vectors from texts whose domains are known."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from steermoe.cli import loading
from steermoe.cli import options as o
from steermoe.cli.embed import print_problems
from steermoe.cli.vectors import learned
from steermoe.cli.vectors.selection import Selection, changed_options

if TYPE_CHECKING:
    from steermoe.discovery.contrast import Expert
    from steermoe.discovery.labelled import Contrast
    from steermoe.discovery.packaged import Language
    from steermoe.evaluation.learning import Learned
    from steermoe.vectors.vector import SteeringVector

EXAMPLES = """Examples:

steermoe vectors build --model ./my-model

steermoe vectors build --topic "pirates at sea" --topic "a robot in the kitchen" -o my_vectors

steermoe vectors build --texts sport=texts/sport --texts food=recipes.jsonl --threshold 1.5

steermoe vectors build --texts chess=chess.jsonl --against other.jsonl --lists 20 -o my_vectors

steermoe vectors build --texts sport=news.csv --against news.csv --label-field kind

steermoe vectors build --rule dsmoe -o by_dsmoe

steermoe vectors build --texts chess=chess.jsonl --rule learned --budget 0.3 -o learned
"""

LabelField = Annotated[
    str | None,
    typer.Option(
        help="Use only records in which this field is the domain's name; for --against, those of no domain.",
        rich_help_panel="Corpus",
    ),
]


@o.spread
def build(
    *,
    texts: Annotated[
        list[str] | None,
        typer.Option("--texts", help="DOMAIN=PATH of its texts; repeat for several. Default: texts of eight domains."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Other texts: build vectors as contrasts against them, with lists of experts to force and to ban."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the vectors. Default: steering_vectors/MODEL.")
    ] = None,
    selection: Selection,
    topics: o.TopicOptions,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the vector of a --topic. Default: made of its words.", rich_help_panel=o.TOPIC),
    ] = None,
    language: Annotated[
        Literal["en", "ru", "both"] | None,
        typer.Option(
            help="Language of the packaged texts, or of what the model is asked about a --topic. Default: en, or that "
            "of the topic."
        ),
    ] = None,
    reading: Annotated[o.CorpusOptions, o.Group(without=("label_field",))],
    label_field: LabelField = None,
    model: loading.Source,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
    json: o.Json = False,
) -> None:
    """Build a vector for each domain from its texts, or for a topic in words. Prints the paths.

    With --against it also prints the lists of experts.
    """
    if topics.topic:
        if texts:
            raise typer.BadParameter("--topic has the model write the texts: leave out --texts, or --topic")
        if selection.rule != "paper":
            raise typer.BadParameter(
                f"--rule {selection.rule} is for texts that are there: leave it out, or name the texts kept beside a "
                "topic's vector with --texts NAME=NAME.texts.jsonl"
            )
        _check_no_texts(against, selection, reading, label_field)
        _build_topics(model, topics, name, output, language, force, json)
        return
    if name is not None:
        raise typer.BadParameter("--name is for the vector of a --topic: give one, or name domains with --texts")
    if not texts:
        _check_no_texts(against, selection, reading, label_field)
        _build_packaged(model, output, selection, language or "en", force, json)
        return
    sources = _parse_sources(texts, language)
    selection.check_comparable(len(sources), against is not None)
    _build_labelled(sources, against, output, selection, reading, label_field, model, force, json)


def _build_labelled(
    sources: dict[str, Path],
    against: Path | None,
    output: Path | None,
    selection: Selection,
    reading: o.CorpusOptions,
    label_field: str | None,
    model: loading.ModelOptions,
    force: bool,
    json: bool,
) -> None:
    """Build the vectors of domains whose texts the user has."""
    from steermoe.cli.terminal import console
    from steermoe.discovery.cutting import thinness
    from steermoe.discovery.domains import read_domains
    from steermoe.vectors import file
    from steermoe.vectors.library import places_for

    paths = places_for(list(sources), output or Path("steering_vectors") / model.group, overwrite=force)
    with console.working("Reading the texts ..."):
        corpora, others = read_domains(
            sources,
            against,
            text_field=reading.text_field,
            label_field=label_field,
            include=reading.include or (),
            encoding=reading.encoding,
            on_read=print_problems,
        )
    loaded = model.source()
    if selection.rule == "learned":
        _print_learned(learned.from_texts(loaded, corpora, others, selection.learning, reading.max_tokens), paths, json)
        return
    total = sum(map(len, corpora.values())) + len(others)
    with console.counting("Embedding", "texts", total) as progress:
        vectors, made = selection.vectors(loaded, corpora, others if against else None, reading.max_tokens, progress)
    for vector in vectors:
        file.write_vector(vector, paths[vector.domain])
        if remark := thinness(vector):
            console.note(f"steermoe: {vector.domain}: {remark}")
    _print(vectors, made, paths, json)


def _print(vectors: "list[SteeringVector]", made: "Sequence[Contrast]", paths: dict[str, Path], json: bool) -> None:
    """Print where the vectors are, each with its contrast if it comes from one."""
    from steermoe.cli.terminal import console

    if json:
        console.write_json([_record(paths[v.domain], *made[i : i + 1]) for i, v in enumerate(vectors)])
        return
    for number, vector in enumerate(vectors):
        console.say(str(paths[vector.domain]))
        for contrast in made[number : number + 1]:
            _print_lists(contrast)


def _print_learned(found: "Iterable[Learned]", paths: dict[str, Path], json: bool) -> None:
    """Write learned vectors as they come, and print where they are."""
    from steermoe.cli.terminal import console
    from steermoe.vectors import file

    records = []
    for one in found:
        path = paths[one.vector.domain]
        file.write_vector(one.vector, path)
        gains = {"learned": one.helped, "gain": one.gain, "gain_at_start": one.gain_at_start}
        records.append({**_record(path), **gains})
        if not json:
            console.say(str(path))
    if json:
        console.write_json(records)


def _check_no_texts(
    against: Path | None, selection: Selection, reading: o.CorpusOptions, label_field: str | None
) -> None:
    """Refuse options that have no effect on the packaged texts."""
    given = [
        *(["--against"] if against is not None else []),
        *(["--label-field"] if label_field is not None else []),
        *selection.changed(),
        *changed_options(reading),
    ]
    if given:
        raise typer.BadParameter(f"{given[0]} needs texts of your own: name them with --texts DOMAIN=PATH")


def _build_packaged(
    model: loading.ModelOptions,
    output: Path | None,
    selection: Selection,
    language: "Language",
    force: bool,
    json: bool,
) -> None:
    """Build the vectors of all packaged domains."""
    from steermoe.cli.terminal import console
    from steermoe.discovery import rules
    from steermoe.discovery.packaged_vectors import build_packaged, count_texts
    from steermoe.models.default.spec import DOMAINS
    from steermoe.vectors import file
    from steermoe.vectors.library import places_for

    paths = places_for(DOMAINS, output or Path("steering_vectors") / model.group, overwrite=force)
    loaded = model.source()
    if selection.rule == "learned":
        _print_learned(learned.from_packaged(loaded, language, selection.learning), paths, json)
        return
    if selection.peer is None:
        with console.counting("Building", "texts", count_texts(language)) as progress:
            vectors = build_packaged(
                loaded,
                language,
                stable=selection.rule == "stable",
                progress=progress,
                on_remark=lambda remark: console.note(f"steermoe: {remark}"),
            )
    else:
        with console.counting("Building", "texts", rules.count_texts(selection.peer, language)) as progress:
            vectors = rules.packaged_by_rule(
                loaded, selection.peer, language, experts=selection.experts, progress=progress
            )
    for vector in vectors:
        file.write_vector(vector, paths[vector.domain])
    _print(vectors, (), paths, json)


def _build_topics(
    model: loading.ModelOptions,
    topics: o.TopicOptions,
    name: str | None,
    output: Path | None,
    language: "Language | None",
    force: bool,
    json: bool,
) -> None:
    """Build the vectors of topics from texts that the model writes."""
    from steermoe.cli.terminal import console
    from steermoe.discovery.topic import build_topics, count_texts, drop_work, write_texts
    from steermoe.discovery.writing import style_of
    from steermoe.vectors import file
    from steermoe.vectors.library import places_for

    named = _named(topics, name)
    paths = places_for(list(named), output or Path("steering_vectors") / model.group, overwrite=force)
    source, writing = model.source(), topics.writing
    how = "answers requests" if style_of(source) == "chat" else "continues openings"
    console.note(
        f"steermoe: {source.shape.name} {how}: {writing.texts} texts about each topic and {writing.texts} about other "
        "things; after Ctrl-C the same command resumes"
    )
    with console.counting("Writing", "texts", count_texts(list(named.values()), writing, language)) as progress:
        made = build_topics(
            source,
            named,
            writing,
            language,
            progress=progress,
            on_remark=lambda remark: console.note(f"steermoe: {remark}"),
        )
    for one in made:
        path = paths[one.vector.domain]
        beside = write_texts(one, path)
        file.write_vector(one.vector, path)
        if json:
            continue
        console.say(str(path))
        console.note(f"steermoe: its texts are in '{beside}'", "dim")
    drop_work(source, made, writing)
    if json:
        console.write_json([{**_record(paths[one.vector.domain]), "topic": one.topic} for one in made])


def _named(topics: o.TopicOptions, name: str | None) -> dict[str, str]:
    """The topics by the names of their vectors.

    Raises:
        BadParameter: a name for several topics, one that is not allowed, or two topics with one name.
    """
    from steermoe.discovery.topic import domain_of
    from steermoe.errors import VectorError
    from steermoe.vectors.file import check_domain_name

    given = list(topics.topic or ())
    if name is not None and len(given) > 1:
        raise typer.BadParameter("--name is for one topic: build each with a command of its own, or leave out --name")
    named: dict[str, str] = {}
    for topic in given:
        try:
            domain = domain_of(topic) if name is None else check_domain_name(name)
        except VectorError as error:
            raise typer.BadParameter(str(error)) from error
        if domain in named:
            raise typer.BadParameter(f"two topics would be named '{domain}': build each with a command and a --name")
        named[domain] = topic
    return named


def _parse_sources(texts: list[str], language: str | None = None) -> dict[str, Path]:
    """The paths of the domains' texts, from `sport=PATH`.

    Raises:
        VectorError: not of that form, a name that can't be a domain's, or a domain twice.
    """
    from steermoe.errors import VectorError
    from steermoe.vectors.file import check_domain_name

    if language is not None:
        raise typer.BadParameter("--language chooses among the packaged texts: leave it out, or leave out --texts")
    sources: dict[str, Path] = {}
    for text in texts:
        domain, sign, path = text.partition("=")
        if not sign or not path:
            raise VectorError(
                f"--texts '{text}': write a domain and the path of its texts, for example sport=texts/sport"
            )
        sources[check_domain_name(domain)] = Path(path)
    if len(sources) < len(texts):
        raise VectorError(f"--texts names a domain twice ({', '.join(texts)}): put its texts into one folder")
    return sources


def _record(path: Path, contrast: "Contrast | None" = None) -> dict[str, Any]:
    from steermoe.vectors import file

    record = {**file.read_header(path).as_dict(), "path": str(path)}
    if contrast is not None:
        record |= {"force": [e._asdict() for e in contrast.force], "ban": [e._asdict() for e in contrast.ban]}
    return record


def _print_lists(contrast: "Contrast") -> None:
    """Print the lists as options for `generate`, and the differences on stderr."""
    from steermoe.cli.terminal import console

    def options(name: str, experts: "list[Expert]") -> str:
        return " ".join(f"--{name} {e.layer}:{e.expert}" for e in experts)

    for name, experts in (("force", contrast.force), ("ban", contrast.ban)):
        if experts:
            console.say(options(name, experts))
            shares = ", ".join(f"{e.layer}:{e.expert} {e.difference:+.0%}" for e in experts)
            console.note(f"{contrast.vector.domain}, {name}: {shares}", "dim")
