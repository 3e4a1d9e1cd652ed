"""`steermoe vectors mix`: mixes several vectors into one."""

from pathlib import Path
from typing import Annotated

import typer

from steermoe.cli import options as o

EXAMPLES = """Examples:

steermoe vectors mix sport=0.7 food=0.3 -o picnic

steermoe vectors mix law medicine=-0.5 -o ./law_without_doctors.safetensors
"""


def mix(
    parts: Annotated[
        list[str], typer.Argument(metavar="DOMAIN|FILE[=WEIGHT]...", help="Vectors with optional weights.")
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Name of the mixture, or the path of its file.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Use the vectors of this model.")] = None,
    vectors: o.VectorsFolder = None,
    force: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Mix vectors into one file, which records its parts. Prints the file's path."""
    from steermoe.cli.terminal import console
    from steermoe.errors import VectorError
    from steermoe.steering.spec import parse_domain
    from steermoe.vectors.file import SUFFIX, check_domain_name, read_header, write_vector
    from steermoe.vectors.hub import folder_name
    from steermoe.vectors.library import first_file
    from steermoe.vectors.mixing import mix_files

    group = Path(model).name if model is not None else None
    named = [parse_domain(part) for part in parts]
    files = [first_file(name, folder=vectors, group=group) for name, _ in named]
    is_path = output.endswith(SUFFIX)
    domain = check_domain_name(Path(output).name.removesuffix(SUFFIX) if is_path else output)
    folder = group or folder_name(read_header(files[0]).info.model) or files[0].parent.name
    path = Path(output) if is_path else Path("steering_vectors") / folder / f"{domain}{SUFFIX}"
    if path.exists() and not force:
        raise VectorError(f"'{path}' already exists: pass --force to overwrite it, or --output for another name")
    weighted = [(file, weight) for file, (_, weight) in zip(files, named, strict=True)]
    write_vector(mix_files(weighted, domain), path)
    if json:
        console.write_json({**read_header(path).as_dict(), "path": str(path)})
    else:
        console.say(str(path))
