"""Write traces to a file: a page if its name ends in .html, else JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steermoe.engines.request import Completion
from steermoe.errors import GenerationError
from steermoe.files import atomic_path, why_not_written
from steermoe.tracing.page import page

ENDINGS = (".json", ".html")
VERSION = 1


def check_ending(path: Path) -> Path:
    """The path, if its name says in which form a trace is to be written.

    Raises:
        GenerationError: it ends otherwise, or its folder is missing.
    """
    if path.suffix.lower() not in ENDINGS:
        raise GenerationError(f"'{path}' ends in '{path.suffix}', expected .json or .html: name the trace's file so")
    if not path.parent.is_dir():
        raise GenerationError(f"can't write the trace '{path}': there is no folder '{path.parent}'; create it first")
    return path


def write_traces(
    path: Path, completions: Sequence[Completion], model: str, command: str = "", engine: str = ""
) -> None:
    """Write the traces of completions of one prompt, in the form that the name's ending says.

    Raises:
        GenerationError: another ending, or a file that can't be written.
    """
    check_ending(path)
    if path.suffix.lower() == ".html":
        text = page(completions, model, command, engine)
    else:
        text = as_json(completions, model, command, engine)
    write_text(path, text)


def as_json(completions: Sequence[Completion], model: str, command: str = "", engine: str = "") -> str:
    """One object: each text with what `Completion.as_dict` says about it, and its trace as `Trace.to_dict` gives it."""
    texts = [{**one.as_dict(model), "trace": one.trace and one.trace.to_dict()} for one in completions]
    whole: dict[str, Any] = {"version": VERSION, "model": model, "engine": engine, "command": command, "texts": texts}
    return json.dumps(whole, ensure_ascii=False, separators=(",", ":")) + "\n"


def story_file(folder: Path, record: Mapping[str, Any]) -> Path:
    """Where the trace of a story of `batch` is: under the story's key."""
    return folder / f"{record['job']}.json"


def write_story(folder: Path, record: Mapping[str, Any], completion: Completion) -> None:
    """Write one story's trace, with the record that the file of stories has of it.

    Raises:
        GenerationError: the file can't be written.
    """
    whole = {"version": VERSION, **record, "trace": completion.trace and completion.trace.to_dict()}
    write_text(story_file(folder, record), json.dumps(whole, ensure_ascii=False, separators=(",", ":")) + "\n")


def make_folder(path: Path) -> Path:
    """Create a folder for traces, if it is not there.

    Raises:
        GenerationError: it can't be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GenerationError(f"can't create the folder '{path}': {error.strerror}; name another one") from error
    return path


def write_text(path: Path, text: str) -> None:
    """Write a trace's file whole or not at all."""
    try:
        with atomic_path(path) as partial:
            partial.write_text(text, encoding="utf-8", errors="surrogatepass")
    except OSError as error:
        raise GenerationError(f"can't write the trace '{path}': {why_not_written(error)}; name another file") from error
