"""The models that `llm` knows as `steermoe/NAME`: the default one, and those that `llm steermoe add` added.

They are kept in `steermoe.json` in `llm`'s own folder.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llm

from steermoe.errors import ModelError, quoted, reason, shown
from steermoe.files import atomic_path, why_not_written
from steermoe.models.default.spec import NAME

DEFAULT_NAME = NAME
FILE = "steermoe.json"
KINDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "engine": (str,),
    "quantize": (str, type(None)),
    "trust_remote_code": (bool,),
}
"""What is known of a model: the fields of `session.Opening`, with their types in JSON."""
CHOICES: dict[str, tuple[str | None, ...]] = {"engine": ("auto", "hf", "llamacpp"), "quantize": (None, "int8")}
"""The values of those that are names, as `llm steermoe add` writes them."""


def path() -> Path:
    return llm.user_dir() / FILE


def known() -> dict[str, dict[str, Any]]:
    """The models by name, each with the fields of `session.Opening`.

    Raises:
        ModelError: the file of added models is damaged.
    """
    return {DEFAULT_NAME: {"model": DEFAULT_NAME}, **added()}


def added() -> dict[str, dict[str, Any]]:
    """As `known`, without the default model."""
    file = path()
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, reason(error)) from error
    if not isinstance(found, dict):
        raise _damaged(file, "it holds no object")
    for name, fields in found.items():
        if not (isinstance(fields, dict) and "model" in fields and fields.keys() <= KINDS.keys()):
            raise _damaged(file, f"'{quoted(name)}' is no model")
        if wrong := [field for field, value in fields.items() if not isinstance(value, KINDS[field])]:
            raise _damaged(file, f"'{wrong[0]}' of '{quoted(name)}' is of the wrong type")
        for field, values in CHOICES.items():
            if fields.get(field, values[0]) not in values:
                raise _damaged(file, f"'{field}' of '{quoted(name)}' is {shown(fields[field])}, expected {values}")
    return found


def _damaged(file: Path, why: str) -> ModelError:
    return ModelError(f"'{file}' can't be read ({why}): remove it, and add the models again with `llm steermoe add`")


def add(name: str, fields: Mapping[str, Any]) -> None:
    """Add a model.

    Raises:
        ModelError: there is one of that name, or the file can't be read or written.
    """
    if name in known():
        raise ModelError(
            f"there is a model '{quoted(name)}' already: choose another name with --name, or remove that one with "
            f"`llm steermoe remove {quoted(name)}`"
        )
    _write({**added(), name: dict(fields)})


def remove(name: str) -> None:
    """Remove a model that was added; the model itself stays where it is.

    Raises:
        ModelError: none was added under that name, or the file can't be read or written.
    """
    models = added()
    if name not in models:
        there = ", ".join(models) or "none"
        raise ModelError(f"no model was added as '{quoted(name)}': there are {there}")
    del models[name]
    _write(models)


def _write(models: Mapping[str, Any]) -> None:
    file = path()
    try:
        with atomic_path(file) as partial:
            partial.write_text(json.dumps(models, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ModelError(f"can't write '{file}': {why_not_written(error)}; set LLM_USER_PATH to a folder") from error
