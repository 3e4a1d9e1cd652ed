"""`steermoe vectors`: list, show and check; the other commands have their own files."""

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steermoe.cli import options as o
from steermoe.cli.loading import describe_steerable
from steermoe.cli.terminal import console
from steermoe.cli.vectors import build, discover, export, hub, import_, mix

if TYPE_CHECKING:
    from steermoe.models.description import ModelDescription
    from steermoe.routing.shape import RoutingShape
    from steermoe.vectors.library import Found, VectorFile, Whose

LIST_EXAMPLES = """Examples:

steermoe vectors list

steermoe vectors list --model ./my-model

steermoe vectors list --json
"""
SHOW_EXAMPLES = """Examples:

steermoe vectors show sport

steermoe vectors show sport --threshold 1.5 --png sport.png
"""
CHECK_EXAMPLES = """Examples:

steermoe vectors check sport food

steermoe vectors check sport --model smollm2-moe --json

steermoe vectors check my/old.safetensors --rehash
"""
MAX_KEYWORDS = 3
"""Keywords that are listed per vector."""
FACTS = {
    "title": "title",
    "keywords": "keywords",
    "model": "model",
    "architecture": "architecture",
    "fingerprint": "its routers",
    "shape": "layers x experts",
    "top_k": "experts a token (k)",
    "cut": "threshold",
    "strength": "strength",
    "safe_range": "safe range",
    "damage": "damage (nats)",
    "formula": "formula",
    "parts": "mixed from",
    "texts": "texts",
    "tokens": "tokens",
    "licence": "licence",
    "created_by": "created by",
    "source": "pulled from",
    "sha256": "sha256",
    "tensors_sha256": "sha256 of numbers",
    "path": "file",
}
"""The facts that `show` prints, by their keys in the record, with their labels."""

WHOSE: "dict[Whose | None, str]" = {
    "own": "its own",
    "named": "of its name",
    "changed": "of its name, other weights",
    "foreign": "another model's",
    None: "does not fit",
}
"""What `list` prints about whose a vector is."""
SHOWN_DIGITS = 8
"""Digits of a fingerprint that `list` prints."""

COVERED = {
    "all": "numbers and settings",
    "numbers": "the numbers alone (--rehash adds strength, layers and all other settings)",
}
"""What `check` prints about the hash."""

Target = Annotated[str, typer.Argument(metavar="DOMAIN|FILE", help="A domain, or the path of a vector file.")]
Folder = Annotated[Path | None, typer.Option("--vectors", help="Folder of vectors to search first.")]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="List, show, check, build, discover, mix, import and export vectors, and share them on the Hub.",
)
app.command(epilog=build.EXAMPLES)(build.build)
app.command(epilog=discover.EXAMPLES)(discover.discover)
app.command(epilog=mix.EXAMPLES)(mix.mix)
app.command("import", epilog=import_.EXAMPLES)(import_.import_)
app.command(epilog=export.EXAMPLES)(export.export)
app.command(epilog=hub.PUSH_EXAMPLES)(hub.push)
app.command(epilog=hub.PULL_EXAMPLES)(hub.pull)
app.command(epilog=hub.SEARCH_EXAMPLES)(hub.search)


@app.command("list", epilog=LIST_EXAMPLES)
def list_(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Also say which of them steer this model; loads no weights.")
    ] = None,
    trust_remote_code: o.TrustRemoteCode = False,
    vectors: Folder = None,
    json: o.JsonDocument = False,
) -> None:
    """List all vectors. If a domain has several, steering uses the model's own."""
    from steermoe.cli.terminal import tables
    from steermoe.errors import VectorError
    from steermoe.vectors.file import read_header
    from steermoe.vectors.library import find_vectors, search_path

    files = find_vectors(vectors)
    found = None if model is None else _found(files, describe_steerable(model, trust_remote_code).shape)
    records = []
    for file in files:
        try:
            record = {**read_header(file.path).as_dict(), "domain": file.domain, "path": str(file.path)}
            if found is not None:
                fit = found.get(file.path)
                record |= {"whose": fit and fit.whose, "taken": fit is not None and fit.is_taken}
            records.append(record)
        except VectorError as error:
            console.note(f"steermoe: skipped: {error}")
    if json:
        console.write_json(records)
    elif records:
        titles = ["domain", "model", "routers", "shape", "strength", "keywords", "file"]
        tables.print_table((*titles, *(["for this model"] if model else ())), list(map(_row, records)), wrapping=2)
    else:
        searched = ", ".join(map(str, search_path(vectors)))
        console.note(f"no vectors in {searched}")


def _found(files: "list[VectorFile]", shape: "RoutingShape") -> "dict[Path, Found]":
    """Which files fit a model, by their paths."""
    from steermoe.vectors.library import fitting_by_domain

    return {fit.path: fit for found in fitting_by_domain(files, shape).values() for fit in found}


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    """The row of a vector in the table of `list`."""
    row = (
        record["domain"],
        record["model"],
        record["fingerprint"][:SHOWN_DIGITS],
        _shape(record),
        f"{record['strength']:g}" if record["strength"] is not None else "",
        _some_keywords(record["keywords"]),
        _short_path(Path(record["path"])),
    )
    if "whose" not in record:
        return row
    return (*row, f"{WHOSE[record['whose']]}{', taken' if record['taken'] else ''}")


@app.command(epilog=SHOW_EXAMPLES)
def show(
    target: Target,
    threshold: Annotated[
        float | None,
        typer.Option(help="Show only experts whose frequency exceeds this many times the mean; 0 shows all."),
    ] = None,
    relative: Annotated[
        bool, typer.Option("--relative", help="Compare with the corpus baseline instead of the mean.")
    ] = False,
    png: Annotated[
        Path | None, typer.Option(help="Also draw the vector as a picture, before and after the threshold.")
    ] = None,
    vectors: Folder = None,
    json: o.JsonDocument = False,
) -> None:
    """Show a vector: its facts, and a map of its layers and experts."""
    from dataclasses import replace

    from steermoe.vectors.file import read_header, read_vector
    from steermoe.vectors.library import find_vector

    path = find_vector(target, folder=vectors)[0]
    header, vector = read_header(path), read_vector(path)
    if threshold is not None or relative:
        vector = vector.with_threshold(
            vector.threshold if threshold is None else threshold, relative or vector.relative
        )
        header = replace(header, threshold=vector.threshold, relative=vector.relative)
    if png is not None:
        from steermoe.vectors.picture import draw_vector

        with console.working("Drawing ..."):
            draw_vector(vector, png)
        console.note(f"picture in {png}", "dim")
    record = {**header.as_dict(), "path": str(path)}
    if json:
        console.write_json({**record, "experts": vector.chosen()})
        return
    from steermoe.cli.terminal import tables
    from steermoe.cli.terminal.heatmap import draw

    console.heading(header.domain)
    tables.print_facts(_facts(record, has_threshold=vector.weights is None))
    console.out.print()
    console.out.print(draw(vector, console.out.width, console.out.options.ascii_only), soft_wrap=True)


@app.command(epilog=CHECK_EXAMPLES)
def check(
    targets: Annotated[list[str], typer.Argument(metavar="DOMAIN|FILE...", help="Domains, or paths of vector files.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Also check that they fit this model; loads no weights.")
    ] = None,
    rehash: Annotated[
        bool,
        typer.Option(
            "--rehash",
            help="Write a right file again with what it lacks: a hash of all its settings, and with --model the "
            "fingerprint of that model.",
        ),
    ] = False,
    trust_remote_code: o.TrustRemoteCode = False,
    vectors: Folder = None,
    any_model: Annotated[
        bool, typer.Option("--any-model", help="With --model: also accept vectors of another model of its shape.")
    ] = False,
    json: o.JsonDocument = False,
) -> None:
    """Check vector files: form, numbers, hash, and what the hash covers. The exit code is 1 if any of them is wrong.

    The hash detects damage and edits. It does not prove who made a file.
    """
    if rehash:
        from steermoe.vectors.hub import refuse_places

        refuse_places(targets, "`steermoe vectors pull` it first")
    description = describe_steerable(model, trust_remote_code) if model is not None else None
    results = [_check(target, vectors, description, rehash, any_model) for target in targets]
    are_right = all(result["error"] is None for result in results)
    if json:
        console.write_json({"ok": are_right, "model": description.name if description else None, "files": results})
    else:
        for result in results:
            if result["error"] is None:
                fits = f", fits {description.name}" if description else ""
                facts = f"{_shape(result)}, numbers and hash are right, the hash covers {COVERED[result['covers']]}"
                console.say(f"{result['path']}: '{result['domain']}', {facts}{fits}")
            else:
                console.note(f"steermoe: {result['error']}")
    if not are_right:
        raise typer.Exit(1)


def _check(
    target: str, folder: Path | None, description: "ModelDescription | None", rehash: bool, any_model: bool
) -> dict[str, Any]:
    """The record of one file for `check`; if a domain has several files, of the one that fits the model."""
    from dataclasses import replace

    from steermoe.errors import CompatibilityError, VectorError
    from steermoe.vectors.file import read_header, read_vector, write_vector
    from steermoe.vectors.library import find_vector, is_path, read_fitting

    result = dict.fromkeys(("path", "domain", "layers", "num_experts", "covers", "error"), None) | {"target": target}
    try:
        paths = find_vector(target, folder=folder)
        result["path"] = str(paths[0])
        lacks = ""
        if description is None:
            path, vector = paths[0], read_vector(paths[0])
        else:
            path, vector = read_fitting(paths, description.shape, path=is_path(target), any_model=any_model)
            lacks = description.shape.fingerprint if not vector.info.fingerprint else ""
            lacks = lacks if description.shape.is_named(vector.info.model) else ""
        if rehash and (lacks or read_header(path).sha256 is None):
            known = replace(vector.info, fingerprint=lacks) if lacks else vector.info
            write_vector(replace(vector, info=known), path)
        covers = "numbers" if read_header(path).sha256 is None else "all"
    except (VectorError, CompatibilityError) as error:
        return {**result, "error": str(error)}
    return {
        **result,
        "path": str(path),
        "domain": vector.domain,
        "layers": vector.layers,
        "num_experts": vector.num_experts,
        "covers": covers,
    }


def _facts(record: dict[str, Any], has_threshold: bool) -> dict[str, str]:
    """The facts as `show` prints them; unknown ones are omitted."""
    from steermoe.vectors.vector import format_layers

    usual = "the corpus baseline" if record["relative"] else "the mean frequency"
    texts = {
        **record,
        "keywords": ", ".join(record["keywords"]),
        "parts": ", ".join(record["parts"]),
        "shape": f"{_shape(record)}, decoder layers {format_layers(record['layers'])}",
        "cut": f"{record['threshold']:g} x {usual}" if has_threshold else "none: the weights are given",
        "safe_range": " to ".join(f"{end:g}" for end in record["safe_range"] or ()),
    }
    return {label: str(texts[key]) for key, label in FACTS.items() if texts[key] not in (None, "")}


def _shape(record: dict[str, Any]) -> str:
    return f"{len(record['layers'])} x {record['num_experts']}"


def _short_path(path: Path) -> str:
    """Relative to the current folder or the home folder."""
    home = os.path.expanduser("~")  # noqa: PTH111  # unlike Path.home(), it may stay "~"
    with suppress(OSError):  # the working folder was deleted
        for start, sign in ((str(Path.cwd()), "."), (home, "~")):
            if path.is_relative_to(start):
                return str(Path(sign) / path.relative_to(start))
    return str(path)


def _some_keywords(keywords: tuple[str, ...]) -> str:
    return ", ".join(keywords[:MAX_KEYWORDS]) + (", ..." if len(keywords) > MAX_KEYWORDS else "")
