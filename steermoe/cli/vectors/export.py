"""`steermoe vectors export`: a vector as a file of another tool."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from steermoe.cli import options as o
from steermoe.cli.terminal import console
from steermoe.vectors.exporting import ExportFormat

EXAMPLES = """Examples:

steermoe vectors export sport --format csv

steermoe vectors export sport --format easysteer -o sport.json

steermoe vectors export ./chess.safetensors --format gguf --force
"""


def export(
    target: Annotated[str, typer.Argument(metavar="DOMAIN|FILE", help="A domain, or the path of a vector file.")],
    format: Annotated[ExportFormat, typer.Option("--format", help="What to write.")] = "json",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write. Default: DOMAIN.FORMAT, in this folder.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Use the vector of this model.")] = None,
    vectors: o.VectorsFolder = None,
    force: o.Overwrite = False,
    json: o.JsonDocument = False,
) -> None:
    """Write a vector's weights as a file of another tool. Prints the file's path."""
    from steermoe.errors import VectorError, count_of
    from steermoe.vectors.exporting import ENDINGS, export_vector
    from steermoe.vectors.file import read_vector
    from steermoe.vectors.library import first_file

    source = first_file(target, folder=vectors, group=None if model is None else Path(model).name)
    vector = read_vector(source)
    is_there, path = False, output or Path(f"{vector.domain}{ENDINGS[format]}")
    with suppress(OSError):  # a name that no file can have is an error when it is written
        is_there = path.exists()
    if is_there and not force:
        raise VectorError(f"'{path}' already exists: pass --force to overwrite it, or --output for another file")
    left_out = export_vector(vector, path, format)
    if left_out:
        console.note(
            f"steermoe: left out {count_of(left_out, 'expert')}: EasySteer activates at most {vector.info.top_k} in a "
            "layer, which are those with the largest weights"
        )
    if json:
        console.write_json({"path": str(path), "format": format, "domain": vector.domain, "left_out": left_out})
    else:
        console.say(str(path))
