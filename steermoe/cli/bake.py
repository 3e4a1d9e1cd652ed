"""`steermoe models bake`: writes a checkpoint or GGUF file that any engine runs steered, and takes the steering out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steermoe.cli import options as o
from steermoe.cli.terminal import console

if TYPE_CHECKING:
    from steermoe.evaluation.teacher_forcing import TextFigures
    from steermoe.models.baking.checkpoint import Checkpoint
    from steermoe.models.baking.record import Baked
    from steermoe.models.gguf.bake import GGUFFile
    from steermoe.routing.biases import Kind
    from steermoe.routing.shape import RoutingShape
    from steermoe.steering.plans import SteeringPlan
    from steermoe.steering.spec import SteeringSpec

EXAMPLES = """Examples:

steermoe models bake ./gpt-oss-20b -d sport --strength 4 -o ./gpt-oss-20b-sport

steermoe models bake ./gpt-oss-20b-sport --undo -o ./gpt-oss-20b-again

steermoe models bake ./glm-4.5-air -d sport --strength 1 --choice-only --measure -o ./glm-4.5-air-sport
"""
TEXTS = 24
"""Neutral texts that --measure reads."""


@o.spread
def bake(
    *,
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder, GGUF file or hub id. Default: smollm2-moe.")
    ] = None,
    domain: Annotated[
        list[str] | None,
        o.domains("Domain or vector file to steer toward; repeat as name=weight to mix."),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="Strength c of formula (3). Default: the vector's own, if it is for that formula."),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Decoder layers to steer, for example 15-29. Default: all.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder or .gguf file to write, which must not be there yet.")
    ],
    choice_only: Annotated[
        bool,
        typer.Option("--choice-only", help="Move only which experts are chosen, not their weights: not formula (3)."),
    ] = False,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="With --choice-only: load the model, and compare with formula (3) on texts."),
    ] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Write what was baked as it was before, to the bit.")] = False,
    vectors: Annotated[o.VectorOptions, o.Group(only=("vectors", "any_model"))],
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.JsonDocument = False,
) -> None:
    """Write a model that is steered in any engine, without steermoe: by formula (3), at one strength, for all tokens.

    That is exact where routers add a bias to their logits, as GPT-OSS does; other models are refused. Prints the path.
    """
    from steermoe.steering.baking import spec_to_bake

    if undo:
        steering = {"--domain": domain, "--strength": strength, "--layers": layers, "--vectors": vectors.vectors}
        switches = {"--choice-only": choice_only, "--measure": measure, "--any-model": vectors.any_model}
        _refuse_all({**steering, **switches, "--trust-remote-code": trust_remote_code})
        _undo(model, output, json)
        return
    if not domain:
        raise typer.BadParameter("nothing to bake: name a domain with --domain, such as -d sport")
    if measure:
        _check_measure(model, choice_only)
    spec = spec_to_bake(domain, strength, layers)
    _check(spec, vectors, output)
    with console.working(f"Inspecting {model or 'the default model'} ..."):
        source = _source(model, trust_remote_code)
        source.check("choice" if choice_only else "logits")
        source.check_output(output)
    plan = _plan(spec, vectors, source.shape)
    measured = _measure(model, trust_remote_code, plan) if measure else None
    with console.working(f"Writing {output} ..."):
        baked = _bake(source, plan, choice_only, output)
    _print(baked, plan, choice_only, measured, json)


def _source(model: str | None, trust_remote_code: bool) -> "Checkpoint | GGUFFile":
    """What is to be baked."""
    if model is not None and Path(model).suffix.lower() == ".gguf":
        from steermoe.models.gguf.bake import GGUFFile

        return GGUFFile(model)
    from steermoe.models.baking.checkpoint import Checkpoint

    return Checkpoint(model, trust_remote_code)


def _check(spec: "SteeringSpec", vectors: o.VectorOptions, output: Path) -> None:
    """Fail early: what is wrong with the options for any model, or the output is there already."""
    from steermoe.errors import ModelError, SteeringError
    from steermoe.steering.resolver import check_spec

    if spec.is_unsteered:
        raise SteeringError("--domain none steers nothing, so there is nothing to bake: name a domain, such as sport")
    check_spec(spec, vectors.vectors)
    if output.exists():
        raise ModelError(f"'{output}' already exists: name a place where nothing is yet")


def _plan(spec: "SteeringSpec", vectors: o.VectorOptions, shape: "RoutingShape") -> "SteeringPlan":
    from steermoe.steering.baking import check_strength

    plan = vectors.resolver(shape).plan(spec)
    assert plan is not None
    check_strength(spec, plan)
    o.warn_beyond_safe_range([plan])
    return plan


def _bake(source: "Checkpoint | GGUFFile", plan: "SteeringPlan", choice_only: bool, output: Path) -> "Baked":
    from steermoe.models.baking.record import Steering
    from steermoe.steering.baking import pushes_of
    from steermoe.vectors.file import tensors_sha256

    assert plan.vector is not None
    sha256 = tensors_sha256({"experts": plan.vector.experts})
    kind: Kind = "choice" if choice_only else "logits"
    steering = Steering(kind, plan.vector.domain, plan.strength, sha256, plan.layers)
    return source.bake(steering, pushes_of(source.shape, plan), output)


def _check_measure(model: str | None, choice_only: bool) -> None:
    """Raise UsageError where --measure has nothing to compare, or can't run the model."""
    if not choice_only:
        raise typer.BadParameter("--measure belongs to --choice-only: baking without it is formula (3) itself")
    if model is not None and Path(model).suffix.lower() == ".gguf":
        raise typer.BadParameter("--measure runs transformers, not llama.cpp: measure the checkpoint of this GGUF file")


def _refuse_all(given: dict[str, Any]) -> None:
    """Raise UsageError for options that --undo does not have."""
    if wrong := [name for name, value in given.items() if value not in (None, False)]:
        raise typer.BadParameter(f"{wrong[0]} does not go with --undo, which reads what was baked: leave it out")


def _undo(model: str | None, output: Path, json: bool) -> None:
    if model is None:
        raise typer.BadParameter("--undo needs the folder or .gguf file that was baked: name it first")
    with console.working(f"Writing {output} ..."):
        if Path(model).suffix.lower() == ".gguf":
            from steermoe.models.gguf.bake import undo
        else:
            from steermoe.models.baking.checkpoint import undo
        restored = undo(Path(model), output)
    if json:
        console.write_json({"path": str(restored.path), "restored": restored.tensors, "left_out": restored.left_out})
    else:
        _note_left_out(restored)
        console.say(str(restored.path))


def _measure(model: str | None, trust_remote_code: bool, plan: "SteeringPlan") -> "tuple[TextFigures, TextFigures]":
    from steermoe.cli.loading import ModelOptions

    loaded = ModelOptions(model, trust_remote_code=trust_remote_code).load()
    from steermoe.evaluation.choice_only import compare_with_choice_only
    from steermoe.evaluation.texts import neutral_texts

    with console.working(f"Reading {TEXTS} neutral texts three times ..."):
        return compare_with_choice_only(loaded, plan, neutral_texts()[:TEXTS])


def _print(
    baked: "Baked",
    plan: "SteeringPlan",
    choice_only: bool,
    measured: "tuple[TextFigures, TextFigures] | None",
    json: bool,
) -> None:
    assert plan.vector is not None
    if json:
        figures = {} if measured is None else dict(zip(("additive", "choice_only"), measured, strict=True))
        record: dict[str, Any] = {
            "path": str(baked.path),
            "formula": "choice only" if choice_only else "additive",
            "domain": plan.vector.domain,
            "strength": plan.strength,
            "layers": plan.layers,
            "positions": "all",
            "tensors": baked.tensors,
            "dtype": baked.dtype,
            "rounding": baked.rounding,
            "left_out": baked.left_out,
            "measured": {name: one.as_dict() for name, one in figures.items()} or None,
        }
        console.write_json(record)
        return
    _note_left_out(baked)
    how = "choice only, which is not formula (3): weights of experts stay as they are" if choice_only else "formula (3)"
    console.note(
        f"{plan.vector.domain}, strength {plan.strength:g}, all tokens, {how}; biases of {baked.tensors} routers in "
        f"{baked.dtype}, rounded by at most {baked.rounding:.1g}",
        "dim",
    )
    if choice_only and measured is None:
        console.note("what it does to texts is not known: --measure compares it with formula (3)")
    if measured is not None:
        _print_measured(measured)
    console.say(str(baked.path))


def _note_left_out(baked: "Baked") -> None:
    if baked.left_out:
        console.note(
            f"steermoe: left out {', '.join(baked.left_out)}: hidden, or may hold weights in another form, which are "
            "not changed"
        )


def _print_measured(measured: "tuple[TextFigures, TextFigures]") -> None:
    from math import exp

    from steermoe.cli.terminal import tables

    rows = [
        (
            name,
            f"{one.kl_mean:.3f}",
            f"{one.kl_p95:.3f}",
            f"{one.vector_share:.0%}",
            f"{one.jaccard:.0%}",
            f"{exp(one.nats):.2f}",
        )
        for name, one in zip(("formula (3)", "choice only"), measured, strict=True)
    ]
    titles = ("", "KL mean", "KL 95%", "vector's experts", "choices in common", "perplexity")
    tables.print_table(titles, rows)
    console.note(
        f"{measured[0].tokens:,} tokens of {TEXTS} neutral texts; KL from the unsteered model per token, in nats; its "
        f"perplexity is {exp(measured[0].nats_unsteered):.2f}",
        "dim",
    )
