"""`steermoe evaluate`: how well vectors steer and what it costs, in a folder in which a run can resume."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steermoe.cli import loading, on_demand
from steermoe.cli import options as o
from steermoe.cli.embed import print_problems

if TYPE_CHECKING:
    from steermoe.evaluation.protocol import Design, EvaluationSettings
    from steermoe.evaluation.texts import Labelled
    from steermoe.models.loading import LoadedModel
    from steermoe.vectors.vector import SteeringVector

EXAMPLES = """Examples:

steermoe evaluate --quick -o evaluation

steermoe evaluate -d sport -d law --strengths 2,4,8 -o sweep

steermoe evaluate --quick --more-controls -o controls

steermoe evaluate --formulas all --thresholds absolute,relative --budgets 0.3,1 -o formulas

steermoe evaluate -d chess --openings openings.txt --heldout texts --words lists --model ./my-model -o chess
"""
QUICK_OPENINGS, QUICK_SEEDS, QUICK_TEXTS = 12, 1, 12
PROTOCOL = "Protocol"


@dataclass(frozen=True)
class DesignOptions:
    """Which kinds of steering are compared."""

    formulas: Annotated[
        str | None,
        typer.Option(help="Comma-separated formulas, or all. Default: the vectors' own.", rich_help_panel=o.STEERING),
    ] = None
    scale: Annotated[
        str | None,
        typer.Option(help="Comma-separated scales, or all. Default: the vectors' own.", rich_help_panel=o.STEERING),
    ] = None
    thresholds: Annotated[
        str, typer.Option(help="Comma-separated: own, absolute, relative; or all.", rich_help_panel=o.STEERING)
    ] = "own"
    strengths: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated strengths, for example 1,2,4. Default: the vectors' own.", rich_help_panel=o.STEERING
        ),
    ] = None
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated damage budgets (95th percentile of KL, in nats); adds the largest strength for each.",
            rich_help_panel=o.STEERING,
        ),
    ] = None
    controls: Annotated[
        bool,
        typer.Option(help="Also test shuffled experts and a prompt that names the domain.", rich_help_panel=PROTOCOL),
    ] = True

    more_controls: Annotated[
        bool,
        typer.Option(
            "--more-controls",
            help="Also steer away, by random vectors (20 draws) and toward popular experts, and compare the classifier "
            "with other judges.",
            rich_help_panel=PROTOCOL,
        ),
    ] = False
    second_judge: Annotated[
        Path | None,
        typer.Option(
            help="With --more-controls: the folder of a sentence model that judges by the nearest text.",
            rich_help_panel=PROTOCOL,
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.second_judge is not None and not self.more_controls:
            raise typer.BadParameter("--second-judge is asked only with --more-controls: add that, or leave it out")

    def design(self) -> "Design":
        """The design that the options describe.

        Raises:
            SteeringError: an unknown name, or text that is not a number.
        """
        from steermoe.evaluation.protocol import CUTS, Design, parse_formulas, parse_list, parse_numbers, parse_scales

        return Design(
            formulas=None if self.formulas is None else tuple(parse_formulas(self.formulas)),
            scales=None if self.scale is None else tuple(parse_scales(self.scale)),
            cuts=tuple(parse_list(self.thresholds, CUTS, "threshold")),
            strengths=() if self.strengths is None else tuple(parse_numbers(self.strengths, "strengths")),
            budgets=() if self.budgets is None else tuple(parse_numbers(self.budgets, "budgets")),
            controls=self.controls,
            more_controls=self.more_controls,
            second_judge=self.second_judge,
        )


@dataclass(frozen=True)
class ProtocolOptions:
    """How much is measured, and how texts are generated."""

    seeds: Annotated[
        int | None, typer.Option(min=1, help="Continuations per opening. Default: 3.", rich_help_panel=PROTOCOL)
    ] = None
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Length of a continuation, in tokens.", rich_help_panel=PROTOCOL)
    ] = 48
    texts: Annotated[
        int,
        typer.Option(min=1, help="Neutral texts to measure damage on, and texts per domain.", rich_help_panel=PROTOCOL),
    ] = 24
    temperature: Annotated[
        float,
        typer.Option(
            help="Below 1 sharpens, above 1 flattens the distribution of the next token.", rich_help_panel=o.SAMPLING
        ),
    ] = 0.7
    top_p: Annotated[
        float,
        typer.Option(help="Sample from the likeliest tokens with this total probability.", rich_help_panel=o.SAMPLING),
    ] = 1.0
    min_p: Annotated[
        float,
        typer.Option(
            help="Sample from tokens with at least this share of the likeliest one's probability; 0 for all.",
            rich_help_panel=o.SAMPLING,
        ),
    ] = 0.0
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in one batch.", rich_help_panel=PROTOCOL)] = 150
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="A rough result in minutes: 12 openings, 1 seed, 12 texts.", rich_help_panel=PROTOCOL
        ),
    ] = False

    def settings(self, openings: list[str]) -> "EvaluationSettings":
        from steermoe.evaluation.protocol import EvaluationSettings

        return EvaluationSettings(
            openings=tuple(openings[:QUICK_OPENINGS] if self.quick else openings),
            seeds=self.seeds if self.seeds is not None else QUICK_SEEDS if self.quick else 3,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            forced_texts=QUICK_TEXTS if self.quick else self.texts,
            batch_size=self.batch_size,
            top_p=self.top_p,
            min_p=self.min_p,
        )


@o.spread
def evaluate(
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results; an existing one is resumed.")],
    domain: Annotated[
        list[str] | None,
        typer.Option(
            "--domain", "-d", help="Domain or vector file; repeat for several. Default: all that fit the model."
        ),
    ] = None,
    openings: Annotated[
        Path | None, typer.Option(help="File of openings to continue, one per line. Default: 50 of the package.")
    ] = None,
    heldout: Annotated[
        Path | None,
        typer.Option(help="Held-out labelled texts, some of them labelled `neutral`. Default: those of the package."),
    ] = None,
    corpus: Annotated[o.CorpusOptions, o.Group(without=("max_tokens",))],
    words: Annotated[
        Path | None, typer.Option(help="Folder of word lists, DOMAIN.txt. Default: those of the package, from WordNet.")
    ] = None,
    compared: DesignOptions,
    protocol: ProtocolOptions,
    vectors: o.VectorOptions,
    model: loading.Loaded,
    json: o.Json = False,
) -> None:
    """Measure success, damage and controls of steering. Prints a table and writes a report to the folder.

    A classifier judges success; gibberish, loops and lists of words do not count. Damage is the divergence from the
    unsteered model on neutral texts. Finished stories are kept: after an interruption, run the same command to resume.
    """
    from steermoe.cli.terminal import console
    from steermoe.evaluation.texts import choose_openings, heldout_texts
    from steermoe.figures import check_matplotlib
    from steermoe.vectors.library import find_vector, vectors_for

    design, settings = compared.design(), protocol.settings(choose_openings(openings))
    for name in domain or ():
        if not vectors.can_build(name):
            find_vector(name, folder=vectors.vectors)
    check_matplotlib()
    loaded = model.load()
    built = on_demand.files_of(loaded, vectors, on_demand.wish(vectors, domain or ()))
    names = [str(built.get(name, name)) for name in domain or ()]
    chosen = vectors_for(loaded.shape, names, folder=vectors.vectors, any_model=vectors.any_model)
    source = None if heldout is None else corpus.open(heldout)
    texts = replace(heldout_texts(list(chosen), source), word_lists=words)
    print_problems(source)
    summary = _run(loaded, chosen, texts, settings, design, output)
    for complaint in summary["complaints"]:
        console.note(f"CONTROL FAILED  {complaint}", "bold red")
    if json:
        console.write_json(summary)
    else:
        _print(summary)
    console.note(f"stories, numbers and pictures are in {output}", "dim")


def _run(
    loaded: "LoadedModel",
    vectors: "dict[str, SteeringVector]",
    texts: "Labelled",
    settings: "EvaluationSettings",
    design: "Design",
    output: Path,
) -> dict[str, Any]:
    from steermoe.cli.terminal import console
    from steermoe.evaluation.report import evaluate_into

    with console.working("Evaluating ...") as show:
        return evaluate_into(output, loaded, vectors, texts, settings, design, notify=show)


def _print(summary: dict[str, Any]) -> None:
    """One row per condition: success before and after, damage; then what more controls found."""
    from steermoe.cli.terminal import tables
    from steermoe.evaluation.markdown import AGREEMENT_TITLES, MORE_TITLES, agreement_rows, more_rows
    from steermoe.evaluation.report import TITLES, table_rows

    tables.print_table(TITLES, table_rows(summary), wrapping=1)
    if summary.get("more_controls"):
        tables.print_table(MORE_TITLES, more_rows(summary))
        tables.print_table(AGREEMENT_TITLES, agreement_rows(summary), wrapping=0)
