"""`steermoe embed`: writes the routing embeddings of a corpus to a folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from steermoe.cli import loading
from steermoe.cli import options as o

if TYPE_CHECKING:
    from steermoe.discovery.corpus import Corpus
    from steermoe.discovery.embedder import EmbeddingOptions, RoutingSource
    from steermoe.discovery.store import EmbeddingStore

EXAMPLES = """Examples:

steermoe embed stories -o embeddings

steermoe embed reviews.jsonl --text-field body --label-field kind --max-tokens 256 -o embeddings

steermoe embed prompts.csv --tokens last --hidden --model ./my-model -o embeddings

steermoe embed pile.jsonl.zst --label-field meta.pile_set_name -o embeddings

steermoe embed my-project --include '*.py' --include '*.md' -o embeddings
"""
SHOWN_PROBLEMS = 5
"""Bad records that are printed; the rest is only counted."""
SHOWN_KINDS = 8
"""Kinds of unread files that are printed."""


CorpusPath = Annotated[
    Path,
    typer.Argument(
        metavar="CORPUS",
        help="Folder of texts, or a .txt, .jsonl, .json, .csv, .parquet or .arrow file, also packed (.gz, .zst); - "
        "reads JSON lines from stdin.",
    ),
]


@o.spread
def embed(
    *,
    corpus: CorpusPath,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the embeddings; an existing one is resumed.")
    ],
    texts: o.CorpusOptions,
    features: Annotated[
        Literal["counts", "probabilities"],
        typer.Option(help="How often experts are chosen, or mean router probabilities."),
    ] = "counts",
    tokens: Annotated[Literal["all", "last"], typer.Option(help="All tokens of a text, or only its last one.")] = "all",
    hidden: Annotated[bool, typer.Option("--hidden", help="Also store mean hidden states.")] = False,
    batch_tokens: Annotated[
        int, typer.Option(min=1, max=2**31 - 1, help="Tokens per forward pass, padding included.")
    ] = 2048,
    model: loading.Source,
    json: o.Json = False,
) -> None:
    """Embed a corpus: for each text, how often the model's routers choose each expert. Prints the folder."""
    from dataclasses import asdict

    from steermoe.cli.terminal import console
    from steermoe.discovery.embedder import EmbeddingOptions

    options = EmbeddingOptions(features, tokens, hidden, texts.max_tokens, batch_tokens)
    found = texts.open(corpus)
    check_apart(corpus, output)
    loaded = model.source()
    store = embed_into(output, found, loaded, options)
    if json:
        record = {"path": str(output), **asdict(store.meta), "left_out": found.num_problems}
        console.write_json({**record, "not_read": dict(found.not_read)})
    else:
        console.say(str(output))


def check_apart(corpus: Path, output: Path) -> None:
    """Make sure that embeddings are not written among the texts.

    Raises:
        CorpusError: the folder is the corpus, or a file.
    """
    from steermoe.errors import CorpusError

    if output.exists() and not output.is_dir():
        raise CorpusError(f"'{output}' is a file: name a folder for the embeddings")
    if output.exists() and corpus.exists() and output.samefile(corpus):
        raise CorpusError(f"the embeddings would be written among the texts in '{output}': name a folder of their own")


def open_embeddings(
    folder: Path, texts: o.CorpusOptions, model: loading.ModelOptions, context: typer.Context
) -> "EmbeddingStore":
    """Embeddings that are used as they are; `context` knows which options are on the command line.

    Raises:
        CorpusError: they are damaged, or were made with another option than one that the user gives.
    """
    from steermoe.cli.terminal import console
    from steermoe.discovery.store import EmbeddingStore
    from steermoe.errors import CorpusError

    store = EmbeddingStore.open(folder)
    meta = store.meta
    made_with = {
        "max_tokens": (texts.max_tokens, meta.max_tokens),
        "text_field": (texts.text_field, meta.text_field),
        "label_field": (texts.label_field, meta.label_field or None),
        "model": (model.group, Path(meta.model).name),
        "dtype": (model.dtype, meta.dtype),
    }
    for name in (*made_with, "include", "encoding", "device_map", "trust_remote_code"):
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        given, was = made_with.get(name, (True, False))
        option = "--" + name.replace("_", "-")
        if given != was:
            made = f"were made with {option} {was}, not {given}"
            if not was:
                made = "exist already" if name not in made_with else f"were made without {option}"
                made = "don't say what they were made with" if name in made_with and store.version == 1 else made
            raise CorpusError(
                f"the embeddings in '{folder}' {made}: leave out {option}, or embed the corpus into another folder"
            )
    if store.version == 1:
        console.note(
            f"steermoe: '{folder}' was written by an earlier version: it has no hashes, so damage may go unnoticed"
        )
    return store


def embed_into(
    folder: Path, corpus: "Corpus", loaded: "RoutingSource", options: "EmbeddingOptions | None" = None
) -> "EmbeddingStore":
    """Embed with a progress bar, and print what is skipped. The corpus is read twice, to count its texts first."""
    from steermoe.cli.terminal import console
    from steermoe.discovery.embed_corpus import embed_corpus

    with console.working("Reading the corpus ..."):
        total = sum(1 for _ in corpus)
    print_problems(corpus)
    with console.counting("Embedding", "texts", total) as progress:
        store, skipped = embed_corpus(loaded, corpus, folder, options, progress=progress)
    for name in skipped[:SHOWN_PROBLEMS]:
        console.note(f"steermoe: skipped {name}: it has no tokens")
    if len(skipped) > SHOWN_PROBLEMS:
        console.note(f"steermoe: {len(skipped)} texts without tokens were skipped in total")
    if store.version == 1:
        console.note(
            f"steermoe: '{folder}' was begun by an earlier version: it has no hashes, and the weights and the dtype "
            "that it was begun with are unknown"
        )
    return store


def print_problems(corpus: "Corpus | None") -> None:
    """Print on stderr the first bad records of a corpus, how many there are, and what kinds of files were not read."""
    from steermoe.cli.terminal import console

    if corpus is None:
        return
    for problem in corpus.problems[:SHOWN_PROBLEMS]:
        console.note(f"steermoe: skipped {problem}")
    if corpus.num_problems > SHOWN_PROBLEMS:
        console.note(f"steermoe: {corpus.num_problems} records were skipped in total")
    if corpus.not_read:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in corpus.not_read.most_common(SHOWN_KINDS))
        more = ", ..." if len(corpus.not_read) > SHOWN_KINDS else ""
        files = f"{corpus.not_read.total():,} of {corpus.not_read.total() + corpus.num_read:,} files"
        fix = "" if corpus.include else "; --include '*.ENDING' reads others"
        console.note(f"steermoe: not read in '{corpus.path}': {files} ({kinds}{more}){fix}")
