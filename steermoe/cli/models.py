"""`steermoe models`: lists families, pulls the default model, inspects, compiles, exports and bakes checkpoints."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from steermoe.cli import bake
from steermoe.cli import options as o
from steermoe.cli.embed import print_problems
from steermoe.cli.loading import ModelOptions
from steermoe.cli.terminal import console
from steermoe.models.default.pull import DEFAULT_MODEL
from steermoe.routing.architectures import PYTHON_ONLY

if TYPE_CHECKING:
    from steermoe.discovery.health import RoutingHealth
    from steermoe.engines.hf.compiled.records import Record
    from steermoe.models.description import ModelDescription
    from steermoe.vectors.library import Found

LIST_EXAMPLES = """Examples:

steermoe models list

steermoe models list --json
"""
PULL_EXAMPLES = """Examples:

steermoe models pull

steermoe models pull --base SmolLM2-135M-Instruct.Q4_1.gguf --force
"""
INSPECT_EXAMPLES = """Examples:

steermoe models inspect smollm2-moe

steermoe models inspect ./my-model --json

steermoe models inspect smollm2-moe --texts stories --png load.png
"""
COMPILE_EXAMPLES = """Examples:

steermoe models compile

steermoe models compile --quantize int8

steermoe models compile ./my-model --dtype float32
"""
EXPORT_EXAMPLES = """Examples:

steermoe models export --gguf q8_0

steermoe models export ./my-model --gguf bf16 -o my-model.gguf
"""

FIRST_DOMAIN = "sport"
"""The domain of the command to run next, if the model has no vector yet."""
WHOSE = {
    "own": "its own",
    "named": "of its name",
    "changed": "of its name, other weights",
    "foreign": "another model's",
}
FORMS = {"int8": "int8 with the rest in bfloat16", "file": "as stored, in llama.cpp"}
"""What the card says about types of weights whose names say little."""
COMPILED = ("kind", "dtype", "state", "reason", "speedup")
"""What the JSON of `inspect` says about each compiled step."""
MAX_LISTED = 8
"""Experts that are named; the rest is counted."""

Checkpoint = Annotated[str | None, typer.Argument(help="Checkpoint folder or hub id. Default: smollm2-moe.")]

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="List, pull, inspect, compile, export and bake models."
)
app.command(epilog=bake.EXAMPLES)(bake.bake)


@app.command("list", epilog=LIST_EXAMPLES)
def list_(json: o.JsonDocument = False) -> None:
    """List the MoE families of the installed transformers, and whether and how each can be steered."""
    from steermoe.cli.terminal import tables
    from steermoe.routing.families import list_families

    families = list_families()
    if json:
        fields = ("family", "steerable", "reason")
        console.write_json([{name: getattr(family, name) for name in fields} for family in families])
        return
    rows = [
        (family.family, "yes" if family.steerable else "no", ", ".join(filter(None, (*family.routers, family.reason))))
        for family in families
    ]
    tables.print_table(("family", "steerable", "routers, or the reason"), rows)
    steerable = sum(family.steerable for family in families)
    console.note(f"{steerable} of {len(families)} families can be steered", "dim")


@app.command(epilog=PULL_EXAMPLES)
def pull(
    base: Annotated[
        str | None,
        typer.Option(help="Local dense base model: GGUF file, folder or hub id. Default: download it."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Assemble it again if it exists.")] = False,
    json: o.JsonDocument = False,
) -> None:
    """Pull and assemble the default model. Prints its folder in the cache."""
    from steermoe.models.default.pull import pull as assemble

    with console.working("Pulling and assembling the default model ..."):
        folder = assemble(base, force=force)
    if json:
        console.write_json({"name": DEFAULT_MODEL, "path": str(folder)})
    else:
        console.say(str(folder))


@app.command("compile", epilog=COMPILE_EXAMPLES)
def compile_(
    model: Checkpoint = None,
    dtype: o.Dtype = "auto",
    quantize: o.Quantize = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.JsonDocument = False,
) -> None:
    """Compile a model's decode step for this CPU: takes minutes, makes all later texts faster.

    Compiles one step for single texts and one for batches. Each is compared with the model: a wrong step is dropped, a
    step that is not faster is not used. `batch` runs small models in float32: compile for it with --dtype float32.
    """
    from dataclasses import asdict

    from steermoe.cli.terminal import tables

    loaded = ModelOptions(model, dtype=dtype, trust_remote_code=trust_remote_code, quantize=quantize).load()
    from steermoe.engines.hf.compiled.artifacts import KINDS, compile_step, folder_of

    rows = []
    for kind in KINDS:
        with console.working(f"Compiling the step of {kind} text{'s' * (kind == 'many')} ..."):
            facts = compile_step(loaded.model, kind)
        rows.append({"model": loaded.name, **asdict(facts), "path": str(folder_of(loaded.model, kind))})
    if json:
        console.write_json(rows)
        return
    tables.print_table(
        ("texts", "compiled in", "off by", "speed-up"),
        [(row["kind"], f"{row['seconds']:.0f} s", f"{row['error']:.0e}", f"{row['speedup']:.2f}") for row in rows],
    )


@app.command(epilog=EXPORT_EXAMPLES)
def export(
    model: Checkpoint = None,
    gguf: Annotated[
        Literal["q8_0", "q4_1", "bf16", "f32"], typer.Option("--gguf", help="Type of the stored matrices.")
    ] = "q8_0",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write. Default: MODEL-QUANTIZATION.gguf.")
    ] = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.JsonDocument = False,
) -> None:
    """Export a model as a GGUF file for llama.cpp. Prints the file's path."""
    loaded = ModelOptions(model, trust_remote_code=trust_remote_code).load()
    from steermoe.models.gguf.export import export_gguf

    path = output or Path(f"{loaded.name.rpartition('/')[2]}-{gguf}.gguf")
    with console.working(f"Writing {path} ..."):
        export_gguf(loaded, path, gguf)
    if json:
        console.write_json(
            {"path": str(path), "model": loaded.name, "quantization": gguf, "bytes": path.stat().st_size}
        )
    else:
        console.say(str(path))


@app.command(epilog=INSPECT_EXAMPLES)
@o.spread
def inspect(
    *,
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder, GGUF file or hub id. Default: smollm2-moe.")
    ] = None,
    texts: Annotated[Path | None, typer.Option(help="Run these texts and print the load of each router.")] = None,
    reading: Annotated[o.CorpusOptions, o.Group(without=("label_field",))],
    png: Annotated[Path | None, typer.Option(help="With --texts: also draw the load as a picture.")] = None,
    options: Annotated[ModelOptions, o.Group(only=("dtype", "device_map", "trust_remote_code"))],
    vectors: Annotated[Path | None, typer.Option("--vectors", help="Folder of vectors to search first.")] = None,
    json: o.JsonDocument = False,
) -> None:
    """Describe a checkpoint: what would be steered, the memory it needs, its vectors, and the command to run next.

    Loads weights only with --texts.
    """
    from dataclasses import replace

    from steermoe.cli.terminal import tables
    from steermoe.engines.hf.compiled.records import records_of
    from steermoe.errors import SteerMoEError
    from steermoe.models.description import describe
    from steermoe.vectors.library import find_vectors, fitting_by_domain

    if texts is not None:
        _inspect_load(replace(options, model=model), texts, reading, png, json)
        return
    if png is not None:
        raise SteerMoEError("--png draws the load of routers on texts: pass --texts CORPUS too")

    with console.working(f"Inspecting {model or DEFAULT_MODEL} ..."):
        description = describe(model, trust_remote_code=options.trust_remote_code)
    found = fitting_by_domain(find_vectors(vectors), description.shape) if description.steerable else {}
    steps = records_of(model)
    command = _next(model, description, found)
    if json:
        listed = [
            {
                "domain": domain,
                "path": str(each.path),
                "fingerprint": each.header and each.header.info.fingerprint,
                "whose": each.whose,
                "taken": each.is_taken,
            }
            for domain, files in found.items()
            for each in files
        ]
        compiled = [{name: getattr(step, name) for name in COMPILED} for step in steps]
        console.write_json({**description.as_dict(), "vectors": listed, "compiled_steps": compiled, "next": command})
    else:
        console.heading(description.name)
        vectors_fact = {"vectors": _vectors(found)} if description.steerable else {}
        steps_fact = {"compiled steps": "; ".join(map(_step, steps))} if steps else {}
        next_fact = {"next": command} if command else {}
        tables.print_facts({**_facts(description), **vectors_fact, **steps_fact, **next_fact})


def _inspect_load(model: ModelOptions, path: Path, reading: o.CorpusOptions, png: Path | None, json: bool) -> None:
    """Run texts and print the load of each router."""
    if png is not None:
        from steermoe.figures import check_matplotlib

        check_matplotlib()
    corpus = reading.open(path)
    with console.working("Reading the corpus ..."):
        total = sum(1 for _ in corpus)
    print_problems(corpus)
    loaded = model.load()
    from steermoe.discovery.health import routing_health

    with console.counting("Running", "texts", total) as progress:
        health = routing_health(
            loaded, (text.text for text in corpus), max_tokens=reading.max_tokens, progress=progress
        )
    if json:
        console.write_json(health.as_dict())
    else:
        _print_load(health)
    if png is not None:  # after the answer, which must appear even if the picture can't be written
        from steermoe.discovery.health import draw_health

        draw_health(health, png)
        console.note(f"picture in {png}", "dim")


def _print_load(health: "RoutingHealth") -> None:
    """Print a row per router, and on stderr what the columns mean."""
    from steermoe.cli.terminal import tables

    rows = [
        (
            str(layer.layer),
            f"{layer.balance_loss:.2f}",
            f"{layer.evenness:.0%}",
            f"{layer.busiest}: {layer.max_to_mean:.1f}x",
            _some(layer.never),
            _some(layer.always),
        )
        for layer in health.layers
    ]
    titles = ("layer", "balance loss", "entropy", "busiest", "never used", "always used")
    tables.print_table(titles, rows, wrapping=2)
    console.note(
        f"{health.tokens:,} tokens of {health.texts:,} texts; mean balance loss {health.balance_loss:.2f} "
        "(1 is balanced); entropy as a share of log N; load as a multiple of balance",
        "dim",
    )


def _some(experts: tuple[int, ...]) -> str:
    """The first few experts, and how many more there are."""
    shown = ", ".join(map(str, experts[:MAX_LISTED]))
    return shown if len(experts) <= MAX_LISTED else f"{shown} and {len(experts) - MAX_LISTED} more"


def _facts(description: "ModelDescription") -> dict[str, str]:
    """The facts of the card by their labels."""
    from steermoe.vectors.vector import format_layers

    d = description
    facts = {"model class": d.model_class, "architecture": d.shape.architecture, "parameters": f"{d.parameters:,}"}
    if d.layers is not None:
        facts["layers"] = str(d.layers)
    if d.steerable:
        facts |= {
            "MoE layers": f"{len(d.moe_layers)} ({format_layers(d.moe_layers)})",
            "experts a layer": " or ".join(map(str, d.experts)),
            "experts a token": " or ".join(map(str, d.top_k)),
            "shared experts": "yes" if d.shared_experts else "no",
            "router": d.router_class,
            "scoring": d.scoring or "the file does not say",
            "fingerprint": d.shape.fingerprint or "unknown: vectors are known by the model's name",
        }
    facts["memory"] = ", ".join(f"{_size(count)} ({FORMS.get(name, name)})" for name, count in d.memory.items())
    if d.cache is not None:
        facts["attention cache"] = f"at most {_size(d.cache)} for 1,000 tokens (bfloat16)"
    if d.tokenizer is None:
        facts["tokenizer"] = "unknown: its files are not on this machine"
    elif not d.tokenizer:
        facts["tokenizer"] = "none: copy its files from the model that this one was made of"
    else:
        facts["chat template"] = "yes" if d.template else "none: it continues texts"
        facts["thinking"] = " ... ".join(d.thinking) if d.thinking else "no tags known"
    if d.baked is not None:
        facts["baked"] = _baked(d.baked)
    steered = f"yes, {len(d.moe_layers)} routers: {d.reason}" if d.steerable else f"no: {d.reason}"
    return {**facts, "can be steered": steered}


def _baked(said: dict[str, Any]) -> str:
    """What was baked into a model, in one line."""
    if "error" in said:
        return str(said["error"])
    layers = "" if said["layers"] is None else ", layers {}-{}".format(*said["layers"])
    return f"{said['domain']}, strength {said['strength']:g}, {said['formula']}{layers}; --undo takes it out"


def _size(count: int) -> str:
    """Bytes as a human reads them."""
    unit, name = next(((unit, name) for unit, name in ((10**9, "GB"), (10**6, "MB")) if count >= unit), (10**3, "kB"))
    return f"{count / unit:,.1f} {name}"


def _vectors(found: "dict[str, list[Found]]") -> str:
    """The domains that have vectors, by whose they are."""
    by_kind: dict[str, list[str]] = {}
    for domain, files in found.items():
        by_kind.setdefault(WHOSE[files[0].whose], []).append(domain)
    return "; ".join(f"{', '.join(domains)} ({kind})" for kind, domains in by_kind.items()) or "none"


def _step(record: "Record") -> str:
    """What became of a compiled step, in a few words."""
    what = f"{'one text' if record.kind == 'one' else 'many texts'} in {record.dtype}"
    if record.state == "compiled" and record.speedup is not None:
        return f"{what} {record.speedup:.1f} times as fast{'' if record.speedup > 1 else ', so not used'}"
    return f"{what} {'begun, or interrupted' if record.state == 'compiling' else f'failed: {record.reason}'}"


def _next(model: str | None, description: "ModelDescription", found: "dict[str, list[Found]]") -> str:
    """The command to run next; "" if the model can't be steered, or can't read texts."""
    import shlex

    if not description.steerable or description.tokenizer is False or description.reason.startswith(PYTHON_ONLY):
        return ""
    own = [domain for domain, files in found.items() if files[0].is_taken]
    domain = FIRST_DOMAIN if FIRST_DOMAIN in own or not own else own[0]
    named = "" if model in (None, DEFAULT_MODEL) else f" --model {shlex.quote(model)}"
    return f"steermoe generate{named} --domain {domain}"
