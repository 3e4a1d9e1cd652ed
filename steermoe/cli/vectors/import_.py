"""`steermoe vectors import`: a vector out of the file of another tool."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from steermoe.cli import options as o
from steermoe.cli.loading import describe_steerable
from steermoe.cli.terminal import console
from steermoe.vectors.importing import ImportFormat

EXAMPLES = """Examples:

steermoe vectors import matrix.json --domain chess

steermoe vectors import matrix.json --domain chess --model ./my-model -o chess.safetensors

steermoe vectors import clusters.json --domain chess --cluster 12 --model ./my-model

steermoe vectors import ranking.pkl --domain faithful --model ./my-model --top 10 --bottom 50
"""


def import_(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Matrix of L layers x N experts as JSON, .npy or .npz; a CSV file with the columns layer, expert, "
            "weight; a file of EasySteer (JSON), SteerMoE (.pkl), DSMoE (JSON) or ds4 (.f32, JSON); or a .gguf that "
            "`vectors export` wrote.",
        ),
    ],
    domain: Annotated[str, typer.Option("--domain", "-d", help="Name of the vector.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model that the vector is for; the shape is checked.")
    ] = None,
    format: Annotated[
        ImportFormat | None, typer.Option("--format", help="Format of the file. Default: recognised by its content.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Key of the vector, if FILE is a dictionary of several. Default: DOMAIN.")
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(min=1, help="Of a list of scores, steer toward this many experts with the largest scores."),
    ] = None,
    bottom: Annotated[
        int | None,
        typer.Option(min=1, help="Of a list of scores, steer away from this many experts with the smallest scores."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write. Default: steering_vectors/MODEL/DOMAIN.safetensors."),
    ] = None,
    force: o.Overwrite = False,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.JsonDocument = False,
) -> None:
    """Convert a file of another tool into a vector file. Prints the file's path. Nothing in the file is run."""
    from steermoe.errors import VectorError
    from steermoe.vectors.file import SUFFIX, check_domain_name, read_header, write_vector
    from steermoe.vectors.importing import import_vector

    domain = check_domain_name(domain)
    description = describe_steerable(model, trust_remote_code) if model is not None else None
    folder = Path(description.name).name if description else "imported"
    is_there, path = False, output or Path("steering_vectors") / folder / f"{domain}{SUFFIX}"
    if path.suffix != SUFFIX:
        raise VectorError(f"'{path}' is not the name of a vector file: end it in {SUFFIX}")
    with suppress(OSError):  # a name that no file can have is an error when it is written
        is_there = path.exists()
    if is_there and not force:
        raise VectorError(f"'{path}' already exists: pass --force to overwrite it, or --output for another file")
    shape = None if description is None else description.shape
    vector = import_vector(file, domain, shape=shape, format=format, cluster=cluster, top=top, bottom=bottom)
    write_vector(vector, path)
    record = {**read_header(path).as_dict(), "path": str(path)}
    if json:
        console.write_json(record)
    else:
        console.say(str(path))
