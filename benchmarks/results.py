"""What benchmarks share that keep their results in a folder: how they end, and how they write a file."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from steermoe.errors import SteerMoEError
from steermoe.files import atomic_path, why_not_written


def write(path: Path, content: str) -> None:
    try:
        with atomic_path(path) as partial:
            partial.write_text(content, encoding="utf-8")
    except OSError as error:
        raise SteerMoEError(f"can't write '{path}': {why_not_written(error)}; name another file") from error


def carry_out(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run a benchmark that resumes from `args.output`; our own errors and interruptions end it with one line."""
    try:
        run(args)
    except SteerMoEError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(f"interrupted: what is finished is in {args.output}; the same command continues")
