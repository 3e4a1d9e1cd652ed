"""`steermoe evaluate`: how well vectors steer and what it costs, in a folder that a run goes on in."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steermoe.cli import loading
from steermoe.cli import options as o
from steermoe.cli.embed import LabelField, TextField

if TYPE_CHECKING:
    from steermoe.evaluation.protocol import Design, EvaluationSettings
    from steermoe.evaluation.texts import Labelled
    from steermoe.models.loading import LoadedModel
    from steermoe.vectors.vector import SteeringVector

EXAMPLES = """Examples:

steermoe evaluate --quick -o evaluation

steermoe evaluate -d sport -d law --strengths 2,4,8 -o sweep

steermoe evaluate --formulas all --thresholds absolute,relative --budgets 0.3,1 -o formulas

steermoe evaluate -d chess --openings openings.txt --heldout texts --words lists --model ./my-model -o chess
"""
QUICK_OPENINGS, QUICK_SEEDS, QUICK_TEXTS = 12, 1, 12
PROTOCOL = "Protocol"

Domains = Annotated[
    list[str] | None,
    typer.Option("--domain", "-d", help="Domain or vector file; repeat. Default: all of the model's."),
]
HeldOut = Annotated[
    Path | None,
    typer.Option(help="Labelled texts that no vector saw, `neutral` among the labels. Default: the package's."),
]
Wide = Annotated[str | None, typer.Option(rich_help_panel=o.STEERING)]


def evaluate(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results; one begun is gone on with.")],
    domain: Domains = None,
    openings: Annotated[
        Path | None, typer.Option(help="Beginnings to continue, a line each. Default: 50 of the package's.")
    ] = None,
    heldout: HeldOut = None,
    text_field: TextField = "text",
    label_field: LabelField = None,
    words: Annotated[
        Path | None, typer.Option(help="Folder of word lists, DOMAIN.txt. Default: the package's, from WordNet.")
    ] = None,
    formulas: Annotated[
        str | None,
        typer.Option(help="Formulas joined by commas, or all. Default: the vectors' own.", rich_help_panel=o.STEERING),
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option(help="Scales joined by commas, or all. Default: the vectors' own.", rich_help_panel=o.STEERING),
    ] = None,
    thresholds: Annotated[
        str, typer.Option(help="own, absolute and relative joined by commas, or all.", rich_help_panel=o.STEERING)
    ] = "own",
    strengths: Annotated[
        str | None,
        typer.Option(
            help="Strengths joined by commas, such as 1,2,4. Default: the vectors' own.", rich_help_panel=o.STEERING
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Also the largest strengths that cost so many nats (95th percentile of KL).",
            rich_help_panel=o.STEERING,
        ),
    ] = None,
    controls: Annotated[
        bool, typer.Option(help="Hold against shuffled experts and a prompt in words.", rich_help_panel=PROTOCOL)
    ] = True,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Continuations an opening. Default: 3.", rich_help_panel=PROTOCOL)
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a continuation.", rich_help_panel=PROTOCOL)
    ] = 48,
    forced_texts: Annotated[
        int, typer.Option("--texts", min=1, help="Texts read for damage, and of each domain.", rich_help_panel=PROTOCOL)
    ] = 24,
    temperature: o.Temperature = 0.7,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in one batch.", rich_help_panel=PROTOCOL)] = 150,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A look in minutes: 12 openings, one seed, 12 texts.", rich_help_panel=PROTOCOL),
    ] = False,
    vectors: o.VectorsFolder = None,
    model: o.Model = None,
    dtype: o.Dtype = "auto",
    device_map: o.DeviceMap = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
) -> None:
    """Measure success, damage and controls of steering. Prints a table, fills the folder.

    A classifier judges success, on texts that are no gibberish, loop or list of words; damage is the divergence from
    the unsteered model on neutral texts. Stories are kept: a run that was ended goes on when it is started again.
    """
    from steermoe.cli.terminal import console
    from steermoe.evaluation.protocol import CUTS, Design, parse_formulas, parse_list, parse_numbers, parse_scales

    design = Design(
        formulas=None if formulas is None else tuple(parse_formulas(formulas)),
        scales=None if scale is None else tuple(parse_scales(scale)),
        cuts=tuple(parse_list(thresholds, CUTS, "threshold")),
        strengths=() if strengths is None else tuple(parse_numbers(strengths, "strengths")),
        budgets=() if budgets is None else tuple(parse_numbers(budgets, "budgets")),
        controls=controls,
    )
    settings = _settings(openings, seeds, max_new_tokens, temperature, forced_texts, batch_size, quick)
    from steermoe.figures import check_matplotlib

    check_matplotlib()
    loaded = loading.load_model(model, dtype, device_map, trust_remote_code)
    chosen = vectors_of(loaded, domain, vectors)
    texts = heldout_texts(heldout, text_field, label_field, list(chosen))
    summary = _run(loaded, chosen, texts, settings, design, output, words)
    for complaint in summary["complaints"]:
        console.err.print(f"CONTROL FAILED  {complaint}", style="bold red", soft_wrap=True)
    if json:
        console.write_json(summary)
    else:
        _print(summary)
    console.err.print(f"stories, figures and pictures in {output}", style="dim", soft_wrap=True)


def vectors_of(loaded: "LoadedModel", domains: list[str] | None, folder: Path | None) -> "dict[str, SteeringVector]":
    """The vectors named, or all on the search path that fit the model; by domain.

    Raises:
        VectorNotFound: one that is named, or any. VectorError: a domain twice.
    """
    from steermoe.errors import CompatibilityError, VectorError, VectorNotFound
    from steermoe.vectors import library

    if domains:
        named = [library.load_vector(name, loaded.model, folder=folder) for name in domains]
        if len({vector.domain for vector in named}) < len(named):
            raise VectorError(f"a domain is named twice ({', '.join(domains)}): name each once")
        return {vector.domain: vector for vector in named}
    found: dict[str, SteeringVector] = {}
    for file in library.find_vectors(folder):
        if file.domain in found:
            continue
        try:
            found[file.domain] = library.load_vector(file.path, loaded.model)
        except CompatibilityError:
            continue
    if not found:
        raise VectorNotFound(f"no vector fits {loaded.name}: name one with --domain, or a folder with --vectors")
    return found


def heldout_texts(path: Path | None, text_field: str, label_field: str | None, domains: list[str]) -> "Labelled":
    """The user's texts, or the package's.

    Raises:
        CorpusError: the package has none of a domain.
    """
    from steermoe.cli.embed import tell_problems
    from steermoe.errors import CorpusError
    from steermoe.evaluation.texts import packaged_texts, read_texts

    if path is not None:
        from steermoe.discovery.corpus import Corpus

        corpus = Corpus(path, text_field=text_field, label_field=label_field)
        texts = read_texts(corpus, domains)
        tell_problems(corpus)
        return texts
    texts = packaged_texts()
    if unknown := [domain for domain in domains if domain not in texts.labels]:
        raise CorpusError(
            f"no held-out texts of '{unknown[0]}' came with steermoe (there are {', '.join(texts.labels)}): give "
            "labelled ones with --heldout"
        )
    return texts


def _settings(
    openings: Path | None,
    seeds: int | None,
    max_new_tokens: int,
    temperature: float,
    forced_texts: int,
    batch_size: int,
    quick: bool,
) -> "EvaluationSettings":
    from steermoe.evaluation.protocol import EvaluationSettings
    from steermoe.evaluation.texts import read_openings
    from steermoe.models.default.stories import openings as packaged_openings

    beginnings = packaged_openings("heldout", 50) if openings is None else read_openings(openings)
    return EvaluationSettings(
        openings=tuple(beginnings[:QUICK_OPENINGS] if quick else beginnings),
        seeds=seeds if seeds is not None else QUICK_SEEDS if quick else 3,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        forced_texts=QUICK_TEXTS if quick else forced_texts,
        batch_size=batch_size,
    )


def _run(
    loaded: "LoadedModel",
    vectors: "dict[str, SteeringVector]",
    texts: "Labelled",
    settings: "EvaluationSettings",
    design: "Design",
    output: Path,
    words: Path | None,
) -> dict[str, Any]:
    from steermoe.cli.terminal import console
    from steermoe.evaluation.report import evaluate_into

    texts = replace(texts, word_lists=words)
    with console.err.status("Evaluating ...") as status:
        return evaluate_into(output, loaded, vectors, texts, settings, design, notify=status.update)


def _print(summary: dict[str, Any]) -> None:
    """One row a condition: success before and after, damage."""
    from steermoe.cli.terminal import tables
    from steermoe.evaluation.report import TITLES, table_rows

    tables.print_table(TITLES, table_rows(summary), wrapping=1)
