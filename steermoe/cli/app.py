"""The `steermoe` command: its groups, and the only place that turns errors into a line on stderr and an exit code."""

import io
import logging
import os
import sys
import warnings
from typing import Annotated

import typer

from steermoe import __version__
from steermoe.cli import batch, calibrate, compare, embed, evaluate, generate, models, serve
from steermoe.cli.terminal import console
from steermoe.cli.vectors import app as vectors
from steermoe.errors import SteerMoEError

EXIT_ERROR, EXIT_INTERRUPTED = 1, 130

app = typer.Typer(
    name="steermoe",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Steer a Mixture-of-Experts language model toward a domain while it generates.",
    epilog="Example: steermoe generate --domain sport",
)
app.command(epilog=generate.EXAMPLES)(generate.generate)
app.command(epilog=compare.EXAMPLES)(compare.compare)
app.command(epilog=batch.EXAMPLES)(batch.batch)
app.command(epilog=embed.EXAMPLES)(embed.embed)
app.command(epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command(epilog=calibrate.EXAMPLES)(calibrate.calibrate)
app.command(epilog=serve.EXAMPLES)(serve.serve)
app.add_typer(vectors.app, name="vectors")
app.add_typer(models.app, name="models")


def _print_version(wanted: bool) -> None:
    if wanted:
        console.write(f"steermoe {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; exit with 0 for success, 1 for an error, 2 for wrong usage, 130 after an interruption."""
    _quiet_libraries()
    if isinstance(sys.stdout, io.TextIOWrapper):  # escapes instead of an error on a terminal without UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="steermoe")  # also under `python -m`, because completion scripts call it
    except SteerMoEError as error:
        console.err.print(console.printable(f"steermoe: {error}"), soft_wrap=True)
        sys.exit(EXIT_ERROR)
    except SystemExit as end:  # typer exits this way, also after Ctrl-C
        if end.code == EXIT_INTERRUPTED:
            console.err.print("\nsteermoe: interrupted")
        raise
    except BrokenPipeError:  # the reader closed the pipe, as `head` does; keep Python from reporting it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_ERROR)


def _quiet_libraries() -> None:
    """Keep the progress bars and warnings of other libraries off the terminal; steermoe shows its own."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|huggingface_hub|vllm)\b")


if __name__ == "__main__":
    main()
