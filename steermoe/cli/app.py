"""The `steermoe` command: its groups, and the only place that turns errors into a line on stderr and an exit code."""

import errno
import io
import logging
import os
import re
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from steermoe import __version__
from steermoe.cli import (
    batch,
    calibrate,
    chat,
    compare,
    embed,
    evaluate,
    generate,
    lm_eval,
    models,
    play,
    serve,
    verify,
)
from steermoe.cli.terminal import console
from steermoe.cli.vectors import app as vectors
from steermoe.errors import SteerMoEError

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
TRACEBACK = "STEERMOE_TRACEBACK"
"""If this variable is set, an error is followed by its traceback."""
REMEDIES = {
    errno.EACCES: "name another file, or change its permissions",
    errno.EROFS: "name a file on another disk",
    errno.ENOSPC: "free some space, or name a file on another disk",
    errno.ENAMETOOLONG: "most disks allow 255 bytes for a name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
UsageError: Any = typer.BadParameter.__base__
"""What typer raises for wrong usage; it exports only this child of it."""
LONG_WORD = re.compile(r"([^\s']{300})[^\s']+")
"""What a message about wrong usage cuts: typer's own quote a value of any length."""

app = typer.Typer(
    name="steermoe",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Steer a Mixture-of-Experts language model toward a domain while it generates.",
    epilog="Example: steermoe generate --domain sport",
)
app.command(epilog=generate.EXAMPLES)(generate.generate)
app.command(epilog=chat.EXAMPLES)(chat.chat)
app.command(epilog=compare.EXAMPLES)(compare.compare)
app.command(epilog=batch.EXAMPLES)(batch.batch)
app.command(epilog=embed.EXAMPLES)(embed.embed)
app.command(epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command(epilog=calibrate.EXAMPLES)(calibrate.calibrate)
app.command("lm-eval", epilog=lm_eval.EXAMPLES)(lm_eval.lm_eval)
app.command(epilog=serve.EXAMPLES)(serve.serve)
app.command(epilog=play.EXAMPLES)(play.play)
app.command(epilog=verify.EXAMPLES)(verify.verify)
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
    try:
        Path.cwd()
    except OSError as error:
        raise SteerMoEError("the working folder no longer exists: change to another one and run again") from error


def main() -> None:
    """Run the command line; exit with 0 for success, 1 for an error, 2 for wrong usage, 130 after an interruption."""
    stdout = sys.stdout
    try:
        _prepare()
        sys.stdout = guarded = cast("Any", console.Stdout(sys.stdout))
        code = app(prog_name="steermoe", standalone_mode=False)  # the name is needed by completion scripts
        guarded.flush()
    except console.StdoutError as error:
        console.discard(stdout)
        code = _fail_to_write(error)
    except SteerMoEError as error:
        code = _fail(str(error), error)
    except (OSError, SystemExit) as error:
        code = _end(error)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except UsageError as error:
        code = _refuse(error)
    except Exception as error:
        code = _fail(_unforeseen(error.__cause__ or error if isinstance(error, typer.Abort) else error), error)
    finally:
        sys.stdout = stdout
    if code == EXIT_INTERRUPTED:  # typer returns it after Ctrl-C
        console.err.print("\nsteermoe: interrupted")
        exec("")  # or Python kills itself if the interruption passed through code in a string, such as a dataclass's
    sys.exit(code)


def _prepare() -> None:
    """Make the streams and the environment such that no library fails on them.

    Raises:
        SteerMoEError: stdout is closed.
    """
    for number in range(3):  # a file that is opened must not become the stdin, stdout or stderr of a library
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
    if sys.stdout is None:
        raise SteerMoEError("stdout is closed, so the answer has no place: send it to a file, or to /dev/null")
    if isinstance(sys.stdout, io.TextIOWrapper):  # escapes instead of an error on a terminal without UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    _quiet_libraries()


class _Notes(logging.Handler):
    """Prints what the library logs."""

    def emit(self, record: logging.LogRecord) -> None:
        console.note(f"steermoe: {record.getMessage()}")


def _quiet_libraries() -> None:
    """Keep the progress bars and warnings of other libraries off the terminal; steermoe shows its own."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    ours = logging.getLogger("steermoe")
    if not ours.handlers:
        ours.addHandler(_Notes(logging.WARNING))
    warnings.filterwarnings("ignore", module=r"(torch|transformers|huggingface_hub|vllm)\b")


# ---- how a command ends ----


def _fail(message: str, error: BaseException, code: int = EXIT_ERROR) -> int:
    """Print what is wrong in one line; returns the exit code."""
    console.note(f"steermoe: {message}")
    if os.environ.get(TRACEBACK):
        for part in traceback.format_exception(error):
            console.err.print(console.printable(part), end="", soft_wrap=True)
    return code


def _refuse(error: Any) -> int:
    """Print what is wrong with the usage in one line, or the help if nothing was given."""
    message = error.format_message()
    if error.ctx is not None and message == error.ctx.get_help():
        console.err.print(console.printable(message), soft_wrap=True)
        return EXIT_USAGE
    cause = error.__cause__  # pydantic's, which keeps the value
    given = [repr(one["input"]) for one in cause.errors()[:1]] if hasattr(cause, "errors") else []
    message = message.replace("Value error, ", "", 1).removesuffix(".")
    if given and given[0] not in message:
        message = f"{message}; it is {given[0]:.80}"
    message = LONG_WORD.sub(r"\1...", message)
    help_of = f" (see `{error.ctx.command_path} --help`)" if error.ctx is not None else ""
    return _fail(f"{message}{help_of}", error, EXIT_USAGE)


def _end(error: OSError | SystemExit) -> int:
    """End after an error of the operating system, or where a library ended the program."""
    cause = error.__context__ if isinstance(error, SystemExit) else error  # typer exits after a broken pipe
    if isinstance(cause, OSError) and (isinstance(error, OSError) or isinstance(cause, BrokenPipeError)):
        return _fail_in_system(cause)
    code = error.code if isinstance(error, SystemExit) else EXIT_ERROR
    if isinstance(code, str):
        return _fail(code, error)
    return code or 0


def _fail_to_write(error: console.StdoutError) -> int:
    cause = error.__cause__
    if isinstance(cause, BrokenPipeError):
        return EXIT_ERROR  # the reader has read enough, as `head` does
    return _fail(f"can't write the answer to stdout: {getattr(cause, 'strerror', None) or cause}", error)


def _fail_in_system(error: OSError) -> int:
    text = error.strerror or str(error) or type(error).__name__
    is_named = isinstance(error.filename, str | bytes | os.PathLike)
    what = f"can't use '{os.fsdecode(error.filename)}': {text}" if is_named else text
    remedy = REMEDIES.get(error.errno or 0)
    return _fail(f"{what}; {remedy}" if remedy else what, error)


def _unforeseen(error: BaseException) -> str:
    """The message of an error that no code of ours raised."""
    from_torch = "torch" in sys.modules
    if from_torch:
        from steermoe.engines.memory import is_out_of_memory
    if isinstance(error, MemoryError) or (from_torch and is_out_of_memory(error)):
        return "there is not enough memory: take a smaller model, batch or file"
    text = f"{type(error).__name__}: {str(error)[:300]}"
    return f"unexpected {text} (a bug: please report it, with what {TRACEBACK}=1 adds)"


if __name__ == "__main__":
    main()
