"""`steermoe vectors build`: steering vectors from texts whose domains are known."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steermoe.cli import loading
from steermoe.cli import options as o
from steermoe.cli.embed import MaxTokens, TextField, tell_problems

if TYPE_CHECKING:
    from steermoe.discovery.contrast import Expert
    from steermoe.discovery.labelled import Contrast
    from steermoe.discovery.store import Text
    from steermoe.vectors.vector import SteeringVector

EXAMPLES = """Examples:

steermoe vectors build --texts sport=texts/sport --texts food=recipes.jsonl --threshold 1.5

steermoe vectors build --texts chess=chess.jsonl --against other.jsonl --lists 20 -o my_vectors

steermoe vectors build --texts sport=news.csv --against news.csv --label-field kind
"""
MAX_LABELS = 8
"""So many labels are named where a domain's isn't among them."""


def build(
    texts: Annotated[list[str], typer.Option("--texts", help="A domain's texts, as name=PATH; repeat.")],
    against: Annotated[
        Path | None, typer.Option(help="Other texts: build contrasts against them, with lists to force and ban.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder. Default: steering_vectors/MODEL.")
    ] = None,
    threshold: Annotated[float, typer.Option(min=0, help="Keep what exceeds so many times the usual frequency.")] = 3.0,
    relative: Annotated[
        bool | None,
        typer.Option(
            "--relative/--absolute",
            help="Usual: the mean of the domains, or 1/N as in the paper. Default: the mean, of more than 3 domains.",
        ),
    ] = None,
    min_difference: Annotated[
        float, typer.Option(min=0, max=1, help="With --against: keep experts so much more often active.")
    ] = 0.1,
    lists: Annotated[int, typer.Option(min=0, help="With --against: experts to force and to ban that are told.")] = 10,
    text_field: TextField = "text",
    label_field: Annotated[
        str | None,
        typer.Option(
            help="Take only the records in which this field is the domain's name; with --against, those of no domain.",
            rich_help_panel="Corpus",
        ),
    ] = None,
    max_tokens: MaxTokens = 512,
    model: o.Model = None,
    engine: o.Engine = "auto",
    dtype: o.Dtype = "auto",
    device_map: o.DeviceMap = None,
    trust_remote_code: o.TrustRemoteCode = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
    json: o.Json = False,
) -> None:
    """Build a vector a domain from its texts. Prints the files' paths, and with --against the lists of experts."""
    from steermoe.cli.terminal import console
    from steermoe.errors import VectorError
    from steermoe.vectors import file

    sources = dict(_parse_source(text) for text in texts)
    if len(sources) < len(texts):
        raise VectorError(f"--texts names a domain twice ({', '.join(texts)}): join its texts in one folder")
    paths = _targets(list(sources), output or Path("steering_vectors") / _group(model), force)
    corpora, others = _read_all(sources, against, text_field, label_field)
    loaded = loading.open_source(model, engine, dtype, device_map, trust_remote_code)
    from steermoe.discovery import labelled

    total = sum(map(len, corpora.values())) + len(others)
    made: list[Contrast] = []
    vectors: list[SteeringVector]
    with console.counting("Embedding", "texts", total) as progress:
        if against is None:
            vectors = labelled.vectors_from_labelled(
                loaded, corpora, threshold=threshold, relative=relative, max_tokens=max_tokens, progress=progress
            )
        else:
            made = labelled.contrasts(
                loaded,
                corpora,
                others,
                min_difference=min_difference,
                count=lists,
                max_tokens=max_tokens,
                progress=progress,
            )
            vectors = [contrast.vector for contrast in made]
    for vector in vectors:
        file.write_vector(vector, paths[vector.domain])
    if json:
        console.write_json([_record(paths[v.domain], *made[i : i + 1]) for i, v in enumerate(vectors)])
        return
    for number, vector in enumerate(vectors):
        console.write(f"{paths[vector.domain]}\n")
        for contrast in made[number : number + 1]:
            _print_lists(contrast)


def _group(model: str | None) -> str:
    """The folder of a model's vectors is called as the model is."""
    from steermoe.models.default.pull import DEFAULT_MODEL

    path = Path(model or DEFAULT_MODEL).resolve()
    return path.stem if path.suffix.lower() == ".gguf" else path.name


def _targets(domains: list[str], folder: Path, force: bool) -> dict[str, Path]:
    """Where each domain's vector goes.

    Raises:
        VectorError: it can't be written there, which is better known before the long work.
    """
    import os

    from steermoe.errors import VectorError
    from steermoe.vectors.file import SUFFIX

    if folder.suffix == SUFFIX:
        raise VectorError(f"--output '{folder}' is a file's name: give a folder, each domain gets a file in it")
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise VectorError(f"can't write to '{folder}': '{there}' is no folder that can be written to; name another")
    paths = {domain: folder / f"{domain}{SUFFIX}" for domain in domains}
    if taken := [path for path in paths.values() if path.exists() and not force]:
        raise VectorError(
            f"'{taken[0]}' is there already: pass --force to overwrite it, or --output for another folder"
        )
    return paths


def _parse_source(text: str) -> tuple[str, Path]:
    """`sport=PATH`."""
    from steermoe.errors import VectorError
    from steermoe.vectors.file import check_domain_name

    domain, sign, path = text.partition("=")
    if not sign or not path:
        raise VectorError(f"--texts '{text}': write a domain and where its texts are, such as sport=texts/sport")
    return check_domain_name(domain), Path(path)


def _read_all(
    sources: dict[str, Path], against: Path | None, text_field: str, label_field: str | None
) -> tuple[dict[str, list[str]], list[str]]:
    """Each domain's texts, and the others. A path that is named several times is read once.

    Raises:
        CorpusError: one can't be read, or holds no text of the label that is wanted.
    """
    from steermoe.cli.terminal import console
    from steermoe.discovery.corpus import Corpus

    places = [*sources.values(), *([against] if against is not None else [])]
    corpora = {place: Corpus(place, text_field=text_field, label_field=label_field) for place in places}
    with console.working("Reading the texts ..."):
        read = {place: list(corpus) for place, corpus in corpora.items()}
    for corpus in corpora.values():
        tell_problems(corpus)
    if label_field is None:
        texts = {place: [text.text for text in found] for place, found in read.items()}
        return {domain: texts[place] for domain, place in sources.items()}, texts[against] if against else []
    own = {domain: _of_label(place, read[place], label_field, domain) for domain, place in sources.items()}
    return own, _of_no_domain(against, read[against], label_field, list(sources)) if against else []


def _of_label(path: Path, texts: "list[Text]", label_field: str, domain: str) -> list[str]:
    from steermoe.errors import CorpusError

    if found := [text.text for text in texts if text.label.lower() == domain]:
        return found
    labels = sorted({text.label for text in texts})
    more = ", ..." if len(labels) > MAX_LABELS else ""
    raise CorpusError(
        f"'{path}' has no text whose '{label_field}' is '{domain}', there are "
        f"{', '.join(map(repr, labels[:MAX_LABELS]))}{more}: name the domain as one of them, or leave out --label-field"
    )


def _of_no_domain(path: Path, texts: "list[Text]", label_field: str, domains: list[str]) -> list[str]:
    from steermoe.errors import CorpusError

    if found := [text.text for text in texts if text.label.lower() not in domains]:
        return found
    raise CorpusError(f"--against '{path}' has only texts whose '{label_field}' is {', '.join(domains)}: give others")


def _record(path: Path, contrast: "Contrast | None" = None) -> dict[str, Any]:
    from steermoe.vectors import file

    record = {**file.read_header(path).as_dict(), "path": str(path)}
    if contrast is not None:
        record |= {"force": [e._asdict() for e in contrast.force], "ban": [e._asdict() for e in contrast.ban]}
    return record


def _print_lists(contrast: "Contrast") -> None:
    """The lists as options that `generate` takes, with the differences on stderr."""
    from steermoe.cli.terminal import console

    def options(name: str, experts: "list[Expert]") -> str:
        return " ".join(f"--{name} {e.layer}:{e.expert}" for e in experts)

    for name, experts in (("force", contrast.force), ("ban", contrast.ban)):
        if experts:
            console.write(f"{options(name, experts)}\n")
            shares = ", ".join(f"{e.layer}:{e.expert} {e.difference:+.0%}" for e in experts)
            console.err.print(f"{contrast.vector.domain}, {name}: {shares}", style="dim", soft_wrap=True)
