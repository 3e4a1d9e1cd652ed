"""`steermoe vectors discover`: finds the domains of a corpus in the model's routing and builds a vector for each."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from steermoe.cli import loading
from steermoe.cli import options as o
from steermoe.cli.embed import embed_into, open_embeddings

if TYPE_CHECKING:
    from steermoe.discovery.store import EmbeddingStore

EXAMPLES = """Examples:

steermoe vectors discover stories -o report

steermoe vectors discover embeddings -o report --threshold 2 --min-cluster-size 50

steermoe vectors discover embeddings -o report --clusters 8 --selection leaf

steermoe vectors discover embeddings -o report --name 0=football --name judge-law=law --force
"""
EMBEDDINGS = "embeddings"
"""The subfolder of the report for the embeddings of a corpus."""
CLUSTERING = "Clustering"
MOST_DIGITS = 10
"""A longer number is no cluster's."""


@dataclass(frozen=True)
class Clustering:
    """How texts are clustered, with the names of `DiscoveryOptions`."""

    algorithm: Annotated[
        Literal["consensus", "hdbscan"] | None,
        typer.Option(
            help="Consensus of many clusterings, or HDBSCAN on UMAP's layout as in the paper. Default: consensus, or "
            "hdbscan with --dimensions or --selection.",
            rich_help_panel=CLUSTERING,
        ),
    ] = None
    min_cluster_size: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Fewest texts of a cluster. Default: half the square root of their number (hdbscan: the whole).",
            rich_help_panel=CLUSTERING,
        ),
    ] = None
    neighbours: Annotated[
        int, typer.Option(min=2, help="Neighbours of each text that UMAP considers.", rich_help_panel=CLUSTERING)
    ] = 15
    cluster_dimensions: Annotated[
        int | None,
        typer.Option(
            "--dimensions",
            min=2,
            help="Dimensions for HDBSCAN, 5 by default; 2 clusters on the map itself, as in the paper.",
            rich_help_panel=CLUSTERING,
        ),
    ] = None
    metric: Annotated[
        Literal["hellinger", "euclidean", "cosine"] | None,
        typer.Option(
            help="Distance between texts. Default: hellinger, or cosine with hidden states.", rich_help_panel=CLUSTERING
        ),
    ] = None
    assign_noise: Annotated[
        bool,
        typer.Option(
            "--assign-noise", help="Assign texts outside all clusters to the nearest one.", rich_help_panel=CLUSTERING
        ),
    ] = False
    seed: Annotated[
        int, typer.Option(min=0, help="The same seed gives the same clusters.", rich_help_panel=CLUSTERING)
    ] = 0
    clusters: Annotated[
        int | None,
        typer.Option(min=2, help="Wanted number of clusters, in place of their size.", rich_help_panel=CLUSTERING),
    ] = None
    selection: Annotated[
        Literal["eom", "leaf"] | None,
        typer.Option(
            help="Of HDBSCAN's nested clusters: the most stable, or the smallest (more of them, of similar size).",
            rich_help_panel=CLUSTERING,
        ),
    ] = None
    other_seeds: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=100,
            help="Other seeds to compare the clusters with. Default: 2 for up to 2,000 texts.",
            rich_help_panel=CLUSTERING,
        ),
    ] = None
    hidden: Annotated[
        bool,
        typer.Option(
            "--hidden/--no-hidden",
            help="Cluster by mean hidden states as well as by routing (embeddings: if they have them).",
            rich_help_panel=CLUSTERING,
        ),
    ] = True


@o.spread
def discover(
    *,
    source: Annotated[
        Path, typer.Argument(metavar="CORPUS|EMBEDDINGS", help="Texts, or a folder that `steermoe embed` wrote.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the report, and for the embeddings if CORPUS is given.")
    ],
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Keep experts over this many times as frequent as usual. Default: 3, less if few layers have any.",
        ),
    ] = None,
    relative: Annotated[
        bool,
        typer.Option("--relative/--absolute", help="Usual frequency: the mean of all texts, or 1/N as in the paper."),
    ] = True,
    name: Annotated[
        list[str] | None, typer.Option(help="Rename a cluster, as NUMBER=NAME or OLD=NAME; repeat for several.")
    ] = None,
    clustering: Clustering,
    texts: o.CorpusOptions,
    model: loading.Loaded,
    context: typer.Context,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing report; other files stay.")] = False,
    json: o.Json = False,
) -> None:
    """Find the domains of a corpus: cluster its texts by routing, name the clusters, build a vector for each.

    Writes a folder with pages, pictures and vectors. Prints the clusters.
    """
    from steermoe.cli.terminal import console
    from steermoe.discovery import page, report

    names = parse_names(name or [])
    report.check_ready(output, force)
    store = _embeddings(source, output / EMBEDDINGS, texts, model, context, clustering.hidden)
    if not store.meta.complete:
        console.note(f"steermoe: '{store.folder}' is incomplete: only a part of its corpus is used")
    from steermoe.discovery import discover as domains

    with console.working("Reading the embeddings ...") as show:
        found = domains.discover(
            store.load(),
            domains.DiscoveryOptions(threshold=threshold, relative=relative, **asdict(clustering)),
            names=names,
            progress=show,
        )
        record = report.write_report(found, output, force=force, progress=show)
    if json:
        console.write_json(record)
    else:
        _print_clusters(record)
    _print_remarks(record)
    console.note(f"report in {output / page.INDEX}", "dim")


def parse_names(names: list[str]) -> dict[int | str, str]:
    """The new names of clusters by their number or old name, from `3=football` and `old=new`.

    Raises:
        VectorError: not of that form, a new name that can't be one, or a cluster named twice.
    """
    from steermoe.errors import VectorError
    from steermoe.vectors.file import check_domain_name, normal_name

    parsed: dict[int | str, str] = {}
    for text in names:
        old, sign, new = text.partition("=")
        if not sign or not old:
            raise VectorError(
                f"--name '{text}': write a cluster's number or name and its new name, for example 3=football"
            )
        key = int(old) if old.isdecimal() and len(old) < MOST_DIGITS else normal_name(old) or old
        if key in parsed:
            raise VectorError(f"--name names cluster '{old}' twice: '{parsed[key]}' and '{new}'")
        parsed[key] = check_domain_name(new)
    return parsed


def _embeddings(
    source: Path,
    folder: Path,
    texts: o.CorpusOptions,
    model: loading.ModelOptions,
    context: typer.Context,
    hidden: bool,
) -> "EmbeddingStore":
    """Open embeddings; or embed a corpus into a folder, or resume an earlier run with what that one stored."""
    from steermoe.discovery.store import EmbeddingStore, is_store

    if is_store(source):
        return open_embeddings(source, texts, model, context)
    corpus = texts.open(source)
    loaded = model.load()
    from steermoe.discovery.embedder import EmbeddingOptions

    if is_store(folder):
        hidden = EmbeddingStore.open(folder).meta.hidden
    return embed_into(folder, corpus, loaded, EmbeddingOptions(hidden=hidden, max_tokens=texts.max_tokens))


def _print_remarks(record: dict[str, Any]) -> None:
    """What speaks against the clusters, and remarks on their vectors, on stderr; several vectors share one line."""
    from steermoe.cli.terminal import console

    noted = [cluster for cluster in record["clusters"] if cluster["note"]]
    cut = [cluster["name"] for cluster in noted if cluster["vector"] is not None]
    notes = [f"{one['name']}: {one['note']}" for one in noted if one["vector"] is None or len(cut) == 1]
    if len(cut) > 1:
        notes.append(f"{len(cut)} vectors are cut at another threshold, the report says why: {', '.join(cut)}")
    for line in (*record["warnings"], *notes):
        console.note(f"steermoe: {line}")


def _print_clusters(record: dict[str, Any]) -> None:
    from steermoe.cli.terminal import console, tables
    from steermoe.discovery.page import sources

    has_sources = any(cluster["labels"] for cluster in record["clusters"])
    titles = ("no.", "name", "texts", *(["main source"] if has_sources else []), "keywords")
    rows = [
        (
            str(cluster["number"]),
            cluster["name"],
            f"{cluster['size']:,}",
            *([sources(cluster, most=1)] if has_sources else []),
            ", ".join(keyword["word"] for keyword in cluster["keywords"]),
        )
        for cluster in record["clusters"]
    ]
    if rows:
        tables.print_table(titles, rows)
    console.write(f"in no cluster: {record['noise']:,} of {record['texts']:,} texts\n")
    if record["adjusted_rand"] is not None:
        console.write(f"agreement with the known sources (adjusted Rand index): {record['adjusted_rand']:.3f}\n")
