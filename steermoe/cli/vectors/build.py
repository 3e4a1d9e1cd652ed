"""`steermoe vectors build`: builds vectors from texts whose domains are known."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from steermoe.cli import loading
from steermoe.cli import options as o
from steermoe.cli.embed import print_problems

if TYPE_CHECKING:
    from steermoe.discovery.contrast import Expert
    from steermoe.discovery.embedder import RoutingSource, TextProgress
    from steermoe.discovery.labelled import Contrast
    from steermoe.discovery.packaged import Language
    from steermoe.vectors.vector import SteeringVector

EXAMPLES = """Examples:

steermoe vectors build --model ./my-model

steermoe vectors build --texts sport=texts/sport --texts food=recipes.jsonl --threshold 1.5

steermoe vectors build --texts chess=chess.jsonl --against other.jsonl --lists 20 -o my_vectors

steermoe vectors build --texts sport=news.csv --against news.csv --label-field kind
"""


@dataclass(frozen=True)
class Selection:
    """Which experts become part of a vector."""

    threshold: Annotated[
        float, typer.Option(min=0, help="Keep experts whose frequency exceeds this many times the usual one.")
    ] = 3.0
    relative: Annotated[
        bool | None,
        typer.Option(
            "--relative/--absolute",
            help="Usual frequency: the mean of all domains, or 1/N as in the paper. Default: the mean, if there are "
            "more than 3 domains.",
        ),
    ] = None
    min_difference: Annotated[
        float,
        typer.Option(min=0, max=1, help="With --against: keep experts whose frequency is higher by more than this."),
    ] = 0.1
    lists: Annotated[
        int, typer.Option(min=0, help="With --against: length of the lists of experts to force and to ban.")
    ] = 10

    def vectors(
        self,
        loaded: "RoutingSource",
        corpora: dict[str, list[str]],
        others: list[str] | None,
        max_tokens: int,
        progress: "TextProgress",
    ) -> "tuple[list[SteeringVector], list[Contrast]]":
        """A vector per domain; with `others`, also the contrasts that the vectors come from."""
        from steermoe.discovery import labelled

        if others is None:
            threshold, relative = self.threshold, self.relative
            return labelled.vectors_from_labelled(
                loaded, corpora, threshold=threshold, relative=relative, max_tokens=max_tokens, progress=progress
            ), []
        made = labelled.contrasts(
            loaded,
            corpora,
            others,
            min_difference=self.min_difference,
            count=self.lists,
            max_tokens=max_tokens,
            progress=progress,
        )
        return [contrast.vector for contrast in made], made


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
    language: Annotated[
        Literal["en", "ru", "both"] | None, typer.Option(help="Language of the packaged texts. Default: en.")
    ] = None,
    reading: Annotated[o.CorpusOptions, o.Group(without=("label_field",))],
    label_field: LabelField = None,
    model: loading.Source,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
    json: o.Json = False,
) -> None:
    """Build a vector for each domain from its texts. Prints the paths, and with --against the lists of experts."""
    from steermoe.cli.terminal import console
    from steermoe.discovery.cutting import thinness
    from steermoe.discovery.domains import read_domains
    from steermoe.vectors import file
    from steermoe.vectors.library import places_for

    if not texts:
        _check_no_texts(against, selection, reading, label_field)
        _build_packaged(model, output, language or "en", force, json)
        return
    sources = _parse_sources(texts, language)
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


def _check_no_texts(
    against: Path | None, selection: Selection, reading: o.CorpusOptions, label_field: str | None
) -> None:
    """Refuse options that have no effect on the packaged texts."""
    given = [
        *(["--against"] if against is not None else []),
        *(["--label-field"] if label_field is not None else []),
        *_changed(selection),
        *_changed(reading),
    ]
    if given:
        raise typer.BadParameter(f"{given[0]} needs texts of your own: name them with --texts DOMAIN=PATH")


def _changed(options: Any) -> list[str]:
    return [f"--{f.name.replace('_', '-')}" for f in fields(options) if getattr(options, f.name) != f.default]


def _build_packaged(
    model: loading.ModelOptions, output: Path | None, language: "Language", force: bool, json: bool
) -> None:
    """Build the vectors of all packaged domains."""
    from steermoe.cli.terminal import console
    from steermoe.discovery.packaged_vectors import build_packaged, count_texts
    from steermoe.models.default.spec import DOMAINS
    from steermoe.vectors import file
    from steermoe.vectors.library import places_for

    paths = places_for(DOMAINS, output or Path("steering_vectors") / model.group, overwrite=force)
    loaded = model.source()
    with console.counting("Building", "texts", count_texts(language)) as progress:
        vectors = build_packaged(
            loaded, language, progress=progress, on_remark=lambda remark: console.note(f"steermoe: {remark}")
        )
    for vector in vectors:
        file.write_vector(vector, paths[vector.domain])
    _print(vectors, (), paths, json)


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
