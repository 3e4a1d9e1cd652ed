"""`steermoe vectors build`: steering vectors from texts whose domains are known."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steermoe.cli import options as o
from steermoe.cli.embed import LabelField, MaxTokens, TextField, tell_problems

if TYPE_CHECKING:
    from steermoe.discovery.contrast import Expert
    from steermoe.discovery.labelled import Contrast
    from steermoe.vectors import SteeringVector

EXAMPLES = """Examples:

steermoe vectors build --texts sport=texts/sport --texts food=recipes.jsonl --threshold 1.5

steermoe vectors build --texts chess=chess.txt --against other.jsonl --lists 20 -o my_vectors
"""


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
    label_field: LabelField = None,
    max_tokens: MaxTokens = 512,
    model: o.Model = None,
    dtype: o.Dtype = "auto",
    device_map: o.DeviceMap = None,
    trust_remote_code: o.TrustRemoteCode = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
    json: o.Json = False,
) -> None:
    """Build a vector a domain from its texts. Prints the files' paths, and with --against the lists of experts."""
    from steermoe import library
    from steermoe.cli import console
    from steermoe.errors import VectorError

    sources = dict(_parse_source(text) for text in texts)
    if len(sources) < len(texts):
        raise VectorError(f"--texts names a domain twice ({', '.join(texts)}): join its texts in one folder")
    group = Path(model).stem if model is not None and model.endswith(".gguf") else Path(model or _default_name()).name
    folder = output or Path("steering_vectors") / group
    paths = {domain: folder / f"{domain}{library.SUFFIX}" for domain in sources}
    if there := [path for path in paths.values() if path.exists() and not force]:
        raise VectorError(
            f"'{there[0]}' is there already: pass --force to overwrite it, or --output for another folder"
        )
    corpora = {domain: _read(path, text_field, label_field) for domain, path in sources.items()}
    others = _read(against, text_field, label_field) if against is not None else []
    loaded = o.load_model(model, dtype, device_map, trust_remote_code)
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
        library.write_vector(vector, paths[vector.domain])
    if json:
        console.write_json([_record(paths[v.domain], *made[i : i + 1]) for i, v in enumerate(vectors)])
        return
    for number, vector in enumerate(vectors):
        console.write(f"{paths[vector.domain]}\n")
        for contrast in made[number : number + 1]:
            _print_lists(contrast)


def _default_name() -> str:
    from steermoe.models import DEFAULT_MODEL

    return DEFAULT_MODEL


def _parse_source(text: str) -> tuple[str, Path]:
    """`sport=PATH`."""
    from steermoe.errors import VectorError
    from steermoe.library import check_domain_name

    domain, sign, path = text.partition("=")
    if not sign or not path:
        raise VectorError(f"--texts '{text}': write a domain and where its texts are, such as sport=texts/sport")
    return check_domain_name(domain), Path(path)


def _read(path: Path, text_field: str, label_field: str | None) -> list[str]:
    from steermoe.discovery.corpus import Corpus

    corpus = Corpus(path, text_field=text_field, label_field=label_field)
    found = [text.text for text in corpus]
    tell_problems(corpus)
    return found


def _record(path: Path, contrast: "Contrast | None" = None) -> dict[str, Any]:
    from steermoe import library

    record = {**library.read_header(path).as_dict(), "path": str(path)}
    if contrast is not None:
        record |= {"force": [e._asdict() for e in contrast.force], "ban": [e._asdict() for e in contrast.ban]}
    return record


def _print_lists(contrast: "Contrast") -> None:
    """The lists as options that `generate` takes, with the differences on stderr."""
    from steermoe.cli import console

    def options(name: str, experts: "list[Expert]") -> str:
        return " ".join(f"--{name} {e.layer}:{e.expert}" for e in experts)

    for name, experts in (("force", contrast.force), ("ban", contrast.ban)):
        if experts:
            console.write(f"{options(name, experts)}\n")
            shares = ", ".join(f"{e.layer}:{e.expert} {e.difference:+.0%}" for e in experts)
            console.err.print(f"{contrast.vector.domain}, {name}: {shares}", style="dim", soft_wrap=True)
