"""`steermoe calibrate`: finds the largest strength within a damage budget and writes it into the vector file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steermoe.cli import loading, on_demand
from steermoe.cli import options as o
from steermoe.cli.embed import print_problems
from steermoe.steering.spec import SteeringSpec

if TYPE_CHECKING:
    from steermoe.discovery.corpus import Corpus
    from steermoe.evaluation.by_layer import LayerStrengths
    from steermoe.evaluation.calibration import Calibration
    from steermoe.models.loading import LoadedModel
    from steermoe.routing.shape import RoutingShape
    from steermoe.vectors.vector import SteeringVector

EXAMPLES = """Examples:

steermoe calibrate -d sport --dry-run

steermoe calibrate -d sport -d food --budget 0.5 -o calibrated

steermoe calibrate -d chess --heldout texts --model ./my-model

steermoe calibrate -d law --by-layer --budget 0.3 -o by_layer
"""


Heldout = Annotated[
    Path | None,
    typer.Option(
        help="Texts to measure on: those labelled `neutral`, else all. Default: neutral stories of the package."
    ),
]
ByLayer = Annotated[
    bool,
    typer.Option(
        "--by-layer",
        help="First give each layer the strength that makes texts of the domain likelier by the most for its damage. "
        "The texts: those of --heldout labelled with the domain, or of the package.",
    ),
]


@o.spread
def calibrate(
    *,
    domain: Annotated[list[str], typer.Option("--domain", "-d", help="Domain or vector file; repeat for several.")],
    budget: Annotated[float, typer.Option(help="Largest allowed 95th percentile of the KL per token, in nats.")] = 1.0,
    heldout: Heldout = None,
    corpus: Annotated[o.CorpusOptions, o.Group(without=("max_tokens",))],
    texts: Annotated[int, typer.Option(min=1, help="Number of texts to read.")] = 24,
    by_layer: ByLayer = False,
    steering: Annotated[SteeringSpec, o.Group(o.STEERING, only=("formula", "scale"))],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the new files. Default: update the files in place."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the results, write nothing.")] = False,
    vectors: o.VectorOptions,
    model: loading.Loaded,
    json: o.Json = False,
) -> None:
    """Find the largest strength within a damage budget and write it, with the safe range, into the vector file.

    `generate` then uses that strength by default, and warns beyond the safe range. If no strength exceeds the budget,
    the result is the smallest one beyond which nothing changes.
    """
    from steermoe.cli.terminal import console, tables
    from steermoe.evaluation.calibration import check_budget
    from steermoe.vectors import file

    check_budget(budget)
    _check_places(domain, changes_them=output is None and not dry_run)
    paths = {name: _files(name, vectors.vectors, vectors.can_build(name)) for name in dict.fromkeys(domain)}
    loaded = model.load()
    from steermoe.evaluation.calibration import calibrate_vector
    from steermoe.evaluation.teacher_forcing import TeacherForcing
    from steermoe.evaluation.texts import neutral_texts

    found = _chosen(loaded, paths, vectors, changes_them=output is None and not dry_run)
    source = None if heldout is None else corpus.open(heldout)
    own = _own_texts([vector.domain for _, vector in found], source) if by_layer else {}
    with console.working("Reading the texts unsteered ..."):
        neutral = neutral_texts(source)
        print_problems(source)
        teacher_forcing, spare = TeacherForcing(loaded, neutral[:texts]), neutral[texts:] or neutral
    results = []
    for path, vector in found:
        layers = None
        if by_layer:
            vector, layers = _by_layer(loaded, vector, (own[vector.domain], spare), budget, steering)
        with console.working(f"Calibrating {vector.domain} ..."):
            calibrated, result = calibrate_vector(teacher_forcing, vector, budget, steering.formula, steering.scale)
        target = path if output is None else output / path.name
        if not dry_run:
            file.write_vector(calibrated, target)
        results.append((calibrated, result, None if dry_run else str(target), layers))
    if json:
        console.write_json([_record(*one) for one in results])
    else:
        tables.print_table(
            ("domain", "formula", "strength", "safe range", "damage", "file"), [_row(*one[:3]) for one in results]
        )


def _check_places(names: list[str], *, changes_them: bool) -> None:
    """Raise VectorError for a vector on the Hub that would be changed."""
    from steermoe.vectors.hub import refuse_places

    if changes_them:
        refuse_places(names, "pass --output FOLDER for a calibrated copy, or --dry-run")


def _files(name: str, folder: Path | None, can_build: bool) -> list[Path]:
    """The files that a name can mean; none if the vector is built now.

    Raises:
        VectorNotFound: there is none.
    """
    from steermoe.errors import VectorNotFound
    from steermoe.vectors.library import find_vector

    try:
        return find_vector(name, folder=folder)
    except VectorNotFound:
        if can_build:
            return []
        raise


def _chosen(
    loaded: "LoadedModel", paths: dict[str, list[Path]], vectors: o.VectorOptions, *, changes_them: bool
) -> "list[tuple[Path, SteeringVector]]":
    """The vectors to calibrate, with their files; those that the model lacks are built first."""
    from steermoe.vectors.library import is_path, read_fitting

    built = on_demand.files_of(loaded, vectors, on_demand.wish(vectors, paths, calibrated=False))
    found = [
        read_fitting(
            [built[name]] if name in built else each, loaded.shape, path=is_path(name), any_model=vectors.any_model
        )
        for name, each in paths.items()
    ]
    if vectors.any_model and changes_them:
        _refuse_to_change_others(found, loaded.shape)
    return found


def _refuse_to_change_others(found: "list[tuple[Path, SteeringVector]]", shape: "RoutingShape") -> None:
    """Raise VectorError for a vector of another model, whose own strength would be overwritten."""
    from steermoe.errors import VectorError
    from steermoe.vectors.library import whose

    for path, vector in found:
        if whose(vector, shape) == "foreign":
            raise VectorError(
                f"'{path}' was built for {vector.info.model}, whose strength it holds: pass --output FOLDER for "
                f"that of {shape.name}, or --dry-run"
            )


def _own_texts(domains: list[str], source: "Corpus | None") -> dict[str, list[str]]:
    """Texts of each domain: those of a corpus labelled with it, or the packaged ones that vectors are built from.

    Raises:
        CorpusError: there are too few.
    """
    from steermoe.discovery.packaged import is_packaged, packaged_texts
    from steermoe.errors import CorpusError, count_of
    from steermoe.evaluation.by_layer import LEAST_TEXTS

    if source is None:
        packaged = packaged_texts()
        own = {domain: packaged[domain] if is_packaged(domain) else [] for domain in domains}
    else:
        read = list(source)
        own = {domain: [text.text for text in read if text.label == domain] for domain in domains}
    for domain, texts in own.items():
        if len(texts) < LEAST_TEXTS:
            place = "the package" if source is None else f"'{source.path}'"
            raise CorpusError(
                f"{place} has {count_of(len(texts), 'text')} labelled '{domain}', --by-layer needs {LEAST_TEXTS}: give "
                "texts in a folder of that name with --heldout, or name their field with --label-field"
            )
    return own


def _by_layer(
    loaded: "LoadedModel",
    vector: "SteeringVector",
    texts: tuple[list[str], list[str]],
    budget: float,
    steering: SteeringSpec,
) -> "tuple[SteeringVector, LayerStrengths]":
    """The vector with a strength by layer, if that helps, and what was found; says so on stderr.

    Args:
        loaded: the model.
        vector: what to calibrate.
        texts: of its domain, and neutral ones.
        budget: nats.
        steering: the formula and the scale.
    """
    from steermoe.cli.terminal import console
    from steermoe.evaluation.by_layer import calibrate_layers
    from steermoe.steering.plans import plan_for

    plan = plan_for(vector, 1.0, formula=steering.formula, scale=steering.scale)
    with console.working(f"Trying the layers of {vector.domain} ..."):
        scaled, found = calibrate_layers(loaded, plan, texts[0], texts[1], budget)
    gains = f"texts of it gain {found.gain:+.3f} nats per token, {found.gain_alike:+.3f} with one strength for all"
    factors = zip(vector.layers, found.factors, strict=True)
    raised = ", ".join(f"{layer} x {factor:g}" for layer, factor in factors if factor)
    outcome = f"strengths by layer: {raised}" if found.helped else "one strength for all layers is kept"
    console.note(f"steermoe: {vector.domain}: {outcome}; {gains}")
    return scaled, found


def _row(vector: "SteeringVector", result: "Calibration", path: str | None) -> tuple[str, ...]:
    limit = f"{result.safe_range[1]:g}" if not result.saturates else f"{result.safe_range[1]:g} (more changes nothing)"
    return (
        vector.domain,
        str(vector.info.formula),
        f"{result.strength:g}",
        f"0 to {limit}",
        f"{result.damage:.2f} of {result.budget:g} nats",
        path or "",
    )


def _record(
    vector: "SteeringVector", result: "Calibration", path: str | None, layers: "LayerStrengths | None"
) -> dict[str, Any]:
    from dataclasses import asdict

    by_layer = {} if layers is None else {"by_layer": {**asdict(layers), "helped": layers.helped}}
    return {
        "domain": vector.domain,
        "formula": vector.info.formula,
        "scale": vector.info.scale,
        **asdict(result),
        "path": path,
        **by_layer,
    }
