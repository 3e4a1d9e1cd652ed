"""`steermoe models`: which families can be steered, the default model, and what is in a checkpoint."""

from typing import TYPE_CHECKING, Annotated

import typer

from steermoe.cli import console
from steermoe.cli import options as o

if TYPE_CHECKING:
    from steermoe.models import ModelDescription

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
"""

Json = Annotated[bool, typer.Option("--json", help="Write JSON.")]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, pull and inspect models.")


@app.command("list", epilog=LIST_EXAMPLES)
def list_(json: Json = False) -> None:
    """List the MoE families of the installed transformers. Tells of each whether and how it is steered."""
    from steermoe.cli import tables
    from steermoe.families import list_families

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
    console.err.print(f"{steerable} of {len(families)} families can be steered", style="dim")


@app.command(epilog=PULL_EXAMPLES)
def pull(
    base: Annotated[
        str | None,
        typer.Option(help="The dense base, if it is here: GGUF file, folder or hub id. Default: downloaded."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Assemble it anew.")] = False,
    json: Json = False,
) -> None:
    """Pull and assemble the default model. Prints its folder in the cache."""
    from steermoe import models

    with console.working("Pulling and assembling the default model ..."):
        folder = models.pull(base, force=force)
    if json:
        console.write_json({"name": models.DEFAULT_MODEL, "path": str(folder)})
    else:
        console.write(f"{folder}\n")


@app.command(epilog=INSPECT_EXAMPLES)
def inspect(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder, GGUF file or hub id. Default: smollm2-moe.")
    ] = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Describe a checkpoint and what would be steered. No weights are loaded."""
    from steermoe import models
    from steermoe.cli import tables

    with console.working(f"Looking at {model or models.DEFAULT_MODEL} ..."):
        description = models.describe(model, trust_remote_code=trust_remote_code)
    if json:
        console.write_json(description.as_dict())
    else:
        console.out.print(console.printable(description.name), style="bold")
        tables.print_facts(_facts(description))


def _facts(description: "ModelDescription") -> dict[str, str]:
    """The card, label by label."""
    from steermoe.vectors import format_layers

    d = description
    facts = {"model class": d.model_class, "architecture": d.architecture, "parameters": f"{d.parameters:,}"}
    if d.layers is not None:
        facts["layers"] = str(d.layers)
    if d.steerable:
        facts |= {
            "MoE layers": f"{len(d.moe_layers)} ({format_layers(d.moe_layers)})",
            "experts a layer": " or ".join(map(str, d.experts)),
            "experts a token": " or ".join(map(str, d.top_k)),
            "shared experts": "yes" if d.shared_experts else "no",
            "router": d.router_class,
            "scoring": d.scoring,
        }
    steered = f"yes, {len(d.moe_layers)} routers: {d.reason}" if d.steerable else f"no: {d.reason}"
    return {**facts, "can be steered": steered}
