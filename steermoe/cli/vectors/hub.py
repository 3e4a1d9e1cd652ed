"""`steermoe vectors push`, `pull` and `search`: share vectors on the Hub, and get those of others."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steermoe.cli import options as o
from steermoe.cli.loading import describe_steerable

if TYPE_CHECKING:
    from steermoe.routing.shape import RoutingShape
    from steermoe.vectors.pushing import Push
    from steermoe.vectors.searching import PackFound
    from steermoe.vectors.vector import SteeringVector

PUSH_EXAMPLES = """Examples:

steermoe vectors push sport food --to USER/my-vectors --dry-run

steermoe vectors push sport --to USER/my-vectors --evaluation evaluation --licence apache-2.0

steermoe vectors push chess.safetensors --to USER/chess --base-model Qwen/Qwen3-30B-A3B --private
"""
PULL_EXAMPLES = """Examples:

steermoe vectors pull USER/REPO

steermoe vectors pull USER/REPO sport --revision v1

steermoe vectors pull USER/REPO sport --model ./my-model -o vectors
"""
SEARCH_EXAMPLES = """Examples:

steermoe vectors search

steermoe vectors search chess --model Qwen/Qwen3-30B-A3B

steermoe vectors search --model ./my-model --json
"""
MOST_SHOWN = 6
"""Domains that are listed of one pack."""
MADE_HERE = "`steermoe models pull` makes the model: the base model, with routers and experts that come with steermoe."
"""What the card says about the default model, which is not on the Hub itself."""


@dataclass(frozen=True)
class CardOptions:
    """What the card of a pack says."""

    base_model: Annotated[
        str | None, typer.Option("--base-model", help="The model's id on the Hub. Default: its name, if that is one.")
    ] = None
    licence: Annotated[
        str | None,
        typer.Option("--licence", "--license", help="Such as apache-2.0 or cc-by-4.0. Default: the vectors' own."),
    ] = None
    evaluation: Annotated[
        Path | None,
        typer.Option(help="Folder that `steermoe evaluate` wrote: the card then says how often the vectors succeed."),
    ] = None

    def wanted(self, vectors: "list[SteeringVector]", message: str = "", private: bool | None = None) -> "Push":
        """How to push vectors.

        Raises:
            SteerMoEError: an evaluation that can't be read, or is not about any of them.
        """
        from steermoe.models.default.base import HUB_ID
        from steermoe.models.default.pull import DEFAULT_MODEL
        from steermoe.vectors.pushing import Push

        measured = {}
        if self.evaluation is not None:
            from steermoe.errors import SteerMoEError
            from steermoe.evaluation.measured import measured as read

            measured = read(self.evaluation, {vector.domain: vector for vector in vectors})
            if missing := [vector.domain for vector in vectors if vector.domain not in measured]:
                raise SteerMoEError(
                    f"'{self.evaluation}' has no success of {', '.join(missing)} at the vector's own strength: run "
                    f"`steermoe evaluate -d {missing[0]} -o FOLDER`, or push it without --evaluation"
                )
        is_default = vectors[0].info.model == DEFAULT_MODEL
        base = self.base_model or (HUB_ID if is_default else "")
        run_with, about = ("", MADE_HERE) if is_default else (None, "")
        return Push(message, private, None, base, self.licence or "", measured, run_with, about)


@o.spread
def push(
    *,
    domains: Annotated[
        list[str], typer.Argument(metavar="DOMAIN|FILE...", help="Vectors of one model, by domain or by path.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="USER/REPO", help="Repository, which is created if necessary.")],
    card: CardOptions,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Push the vectors of this model.")] = None,
    message: Annotated[str, typer.Option(help="What the commit says. Default: the names of the domains.")] = "",
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Who may see a new repository. Default: as the account has it."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the card of these vectors; push nothing, and ask no Hub.")
    ] = False,
    vectors: o.VectorsFolder = None,
    json: o.Json = False,
) -> None:
    """Put vectors into a repository on the Hub, with a card and a map of each. What the repository has already stays.

    Prints the address of the commit. `hf auth login` or HF_TOKEN says who you are.
    """
    from steermoe.cli.terminal import console
    from steermoe.vectors import pushing
    from steermoe.vectors.file import read_vector
    from steermoe.vectors.hub import check_repo, is_place, load
    from steermoe.vectors.library import first_file

    check_repo(to)
    group = Path(model).name if model is not None else None
    chosen = [
        load(name) if is_place(name) else read_vector(first_file(name, folder=vectors, group=group))
        for name in dict.fromkeys(domains)
    ]
    wanted = card.wanted(chosen, message, private)
    if dry_run:
        text = pushing.preview(chosen, to, wanted)
        if json:
            console.write_json({"repo": to, "card": text})
        else:
            console.write(text if text.endswith("\n") else f"{text}\n")
        return
    with console.working(f"Pushing to {to} ..."):
        pushed = pushing.push(chosen, to, wanted)
    if json:
        console.write_json(pushing.as_record(pushed))
        return
    console.say(pushed.url)
    if not pushed.base_model:
        console.note("steermoe: the card names no base model, so nobody finds the pack by it: pass --base-model")
    console.note(f"use it with -d hub:{to}/{chosen[0].domain}", "dim")


def pull(
    repo: Annotated[str, typer.Argument(metavar="USER/REPO", help="Repository with vectors.")],
    domains: Annotated[
        list[str] | None, typer.Argument(metavar="[DOMAIN]...", help="Which vectors. Default: all of them.")
    ] = None,
    revision: Annotated[
        str, typer.Option(help="Branch, tag or commit. Default: the latest commit of the main branch.")
    ] = "",
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Pull nothing unless it is for this model; loads no weights.")
    ] = None,
    any_model: Annotated[
        bool, typer.Option("--any-model", help="With --model: also accept vectors of another model of its shape.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write to. Default: steering_vectors/MODEL.")
    ] = None,
    force: o.Overwrite = False,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.JsonDocument = False,
) -> None:
    """Get vectors from the Hub, check them, and keep them where domains are looked for. Prints the files' paths.

    Each file says which commit it is from. Without a network, the copies that were pulled before are taken.
    """
    from steermoe.cli.terminal import console
    from steermoe.vectors import hub
    from steermoe.vectors.file import check_domain_name
    from steermoe.vectors.library import read_fitting

    place = hub.parse_place(repo) if hub.is_place(repo) else None
    if place is not None and place.revision and revision not in ("", place.revision):
        raise typer.BadParameter(f"'{repo}' and --revision {revision} name two revisions: leave one of them out")
    if place is not None:
        repo, domains, revision = place.repo, [place.domain, *(domains or ())], place.revision or revision
    names = [check_domain_name(name) for name in domains or ()]
    shape = describe_steerable(model, trust_remote_code).shape if model is not None else None
    with console.working(f"Pulling {repo} ..."):
        pack = hub.open_pack(repo, revision)
        if shape is not None:
            for domain in names or sorted(pack.files):
                read_fitting([hub.fetch(pack, domain)], shape, any_model=any_model)
        written = hub.pull(pack, names, output, overwrite=force)
    if pack.why_cached:
        console.note(f"steermoe: {pack.why_cached}; these are copies that were pulled before")
    for name in pack.others if not names else ():
        console.note(f"steermoe: left out '{name}' of {repo}: its name is not DOMAIN.safetensors")
    if json:
        console.write_json([{**header.as_dict(), "path": str(path)} for path, header in written.items()])
        return
    for path in written:
        console.say(str(path))
    console.note(f"from {repo} at {pack.commit}", "dim")


def search(
    text: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="Words that must be in what is known of a pack.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Only packs for this model: its routers if it is here, else its name."),
    ] = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.JsonDocument = False,
) -> None:
    """Find packs of vectors on the Hub, by the names of repositories and domains, models and keywords."""
    from steermoe.cli.terminal import console, tables
    from steermoe.vectors.searching import MOST_PACKS, search

    shape = _shape(model, trust_remote_code) if model is not None else None
    with console.working("Searching ..."):
        found, is_cut = search(" ".join(text or ()), shape)
    if is_cut:
        console.note(f"steermoe: searched the {MOST_PACKS} most downloaded packs, not all")
    if json:
        console.write_json([pack.as_dict() for pack in found])
    elif found:
        titles = ("pack", "model", "licence", "downloads", "updated", "domains")
        tables.print_table(titles, map(_row, found))
    else:
        console.note("no pack of vectors on the Hub is like that")


def _shape(model: str, trust_remote_code: bool) -> "RoutingShape":
    """The shape of a model, as far as it is known without a download: a model that is not here has only a name."""
    from steermoe.models.default.pull import DEFAULT_MODEL, is_pulled
    from steermoe.routing.shape import RoutingShape

    is_here = Path(model).exists() if model != DEFAULT_MODEL else is_pulled()
    return describe_steerable(model, trust_remote_code).shape if is_here else RoutingShape(model, (), ())


def _row(pack: "PackFound") -> tuple[str, ...]:
    more = len(pack.domains) - MOST_SHOWN
    domains = ", ".join(pack.domains[:MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")
    model = pack.model or pack.base_model
    return (pack.repo, model, pack.licence, f"{pack.downloads:,}", pack.updated, domains)
