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
"""
SHOWN_PROBLEMS = 5
"""Bad records that are printed; the rest is only counted."""


CorpusPath = Annotated[
    Path, typer.Argument(metavar="CORPUS", help="Folder of texts, or a .txt, .jsonl, .csv or .parquet file.")
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
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens per forward pass, padding included.")] = 2048,
    model: loading.Source,
    json: o.Json = False,
) -> None:
    """Embed a corpus: for each text, how often the model's routers choose each expert. Prints the folder."""
    from dataclasses import asdict

    from steermoe.cli.terminal import console

    found = texts.open(corpus)
    loaded = model.source()
    from steermoe.discovery.embedder import EmbeddingOptions

    options = EmbeddingOptions(features, tokens, hidden, texts.max_tokens, batch_tokens)
    store = embed_into(output, found, loaded, options)
    if json:
        console.write_json({"path": str(output), **asdict(store.meta), "left_out": found.num_problems})
    else:
        console.say(str(output))


def embed_into(
    folder: Path, corpus: "Corpus", loaded: "RoutingSource", options: "EmbeddingOptions | None" = None
) -> "EmbeddingStore":
    """Embed with a progress bar, then print what was skipped. The corpus is read twice, to count its texts first."""
    from steermoe.cli.terminal import console
    from steermoe.discovery.embed_corpus import embed_corpus

    with console.working("Reading the corpus ..."):
        total = sum(1 for _ in corpus)
    with console.counting("Embedding", "texts", total) as progress:
        store, skipped = embed_corpus(loaded, corpus, folder, options, progress=progress)
    print_problems(corpus)
    for name in skipped[:SHOWN_PROBLEMS]:
        console.note(f"steermoe: skipped {name}: it has no tokens")
    return store


def print_problems(corpus: "Corpus | None") -> None:
    """Print the first bad records of a corpus on stderr and count the rest."""
    from steermoe.cli.terminal import console

    if corpus is None:
        return
    for problem in corpus.problems[:SHOWN_PROBLEMS]:
        console.note(f"steermoe: skipped {problem}")
    if corpus.num_problems > SHOWN_PROBLEMS:
        console.note(f"steermoe: {corpus.num_problems} records were skipped in total")
