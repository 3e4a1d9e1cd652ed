"""The options of a prompt in `llm`, `-o NAME VALUE`, and what they ask for. Imports no torch.

`llm` passes every value as text, and its Python API passes values of Python; both are accepted. Values are checked when
the text is generated, so that what is wrong is one line.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import llm
from pydantic import Field, WithJsonSchema, create_model

from steermoe.engines.request import Sampling
from steermoe.errors import GenerationError, shown
from steermoe.serving.fields import for_clients
from steermoe.steering.asked import spec_of_options
from steermoe.steering.spec import FIELDS, SteeringSpec, read_json

ANSWER_TOKENS = 512
"""The most tokens of an answer, unless an option says; a continuation has the default of `Sampling`."""
TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}
WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
SWITCHES = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
WORDING = (
    ("repeat as name=weight to mix", "sport=0.7,food=0.3 mixes"),
    ("repeat for several", "commas separate several"),
)
"""How a help says that a value is several, on the command line of steermoe and here."""
NOT_STEERING: dict[str, tuple[type, str]] = {
    "chat": (
        bool,
        "Answer by the model's chat template, instead of continuing the prompt. Default: only after a system prompt or "
        "an earlier turn.",
    ),
    "thinking": (bool, "Let the model think before it answers, or not. Default: as its chat template does."),
    "vectors": (str, "Folder of vectors to search first."),
    "no_build": (
        bool,
        "Refuse a domain that the model has no vector of, instead of building and calibrating one first.",
    ),
}
OPTION = re.compile(r"--(no-)?([a-z]+(?:-[a-z]+)*)")


def _steering() -> dict[str, tuple[type, str]]:
    """The type and the help of each field of a spec."""
    hints = get_type_hints(SteeringSpec)
    found: dict[str, tuple[type, str]] = {}
    for field in FIELDS:
        kinds, help = field.metadata["kinds"], field.metadata["help"]
        kind = str if str in kinds or list in kinds else float if float in kinds else int
        choices = [one for part in (hints[field.name], *get_args(hints[field.name])) for one in _choices(part)]
        found[field.name] = kind, " ".join([help, *([f"One of {', '.join(choices)}."] if choices else [])])
    return found


def _choices(hint: Any) -> list[str]:
    return [str(one) for one in get_args(hint)] if get_origin(hint) is Literal else []


def _sampling() -> dict[str, tuple[type, str]]:
    """The type and the help of each field of `Sampling` that is an option."""
    hints = get_type_hints(Sampling)
    return {
        field.name: (hints[field.name], f"{field.metadata['help']} Default: {_default(field.name, field.default)}.")
        for field in fields(Sampling)
        if "help" in field.metadata
    }


def _default(name: str, value: Any) -> str:
    if name == "max_new_tokens":
        return f"{value}, of an answer {ANSWER_TOKENS}"
    return str(value).lower()


STEERING, SAMPLING = _steering(), _sampling()
NAMES = (*STEERING, *SAMPLING, *NOT_STEERING)


def _fields() -> dict[str, Any]:
    made = {}
    for name, (kind, help) in {**STEERING, **SAMPLING, **NOT_STEERING}.items():
        for ours, theirs in WORDING:
            help = help.replace(ours, theirs)
        made[name] = (Annotated[Any, WithJsonSchema({"type": TYPES[kind]})], Field(default=None, description=help))
    return made


Options: type[llm.Options] = create_model("Options", __base__=llm.Options, **_fields())


@dataclass(frozen=True)
class Asked:
    """What the options of a prompt ask for.

    Attributes:
        given: the fields of `Sampling` that are given.
        chat: None for an answer only where there is a system prompt or an earlier turn.
        thinking: as in `Engine.chat`.
        folder: of vectors to search first.
        may_build: whether vectors that the model lacks are built.
    """

    spec: SteeringSpec
    given: Mapping[str, Any]
    chat: bool | None = None
    thinking: bool | None = None
    folder: Path | None = None
    may_build: bool = True

    def sampling(self, *, is_chat: bool) -> Sampling:
        """How tokens are drawn.

        Raises:
            GenerationError: a value out of its range.
        """
        return Sampling(**{**({"max_new_tokens": ANSWER_TOKENS} if is_chat else {}), **self.given})


def read_options(options: Mapping[str, Any]) -> Asked:
    """What options ask for; None leaves one out.

    Raises:
        SteeringError, GenerationError: a value of another type.
    """
    given = {name: value for name, value in options.items() if value is not None}
    steering = {name: value for name, value in given.items() if name in STEERING}
    sampling = {name: _value(name, given[name], SAMPLING[name][0]) for name in SAMPLING if name in given}
    others = {name: _value(name, given[name], NOT_STEERING[name][0]) for name in NOT_STEERING if name in given}
    folder = others.get("vectors")
    return Asked(
        spec_of_options(steering) if steering else SteeringSpec(),
        sampling,
        others.get("chat"),
        others.get("thinking"),
        None if folder is None else Path(folder),
        not others.get("no_build", False),
    )


def _value(name: str, value: Any, kind: type) -> Any:
    """A value of an option, of the right type."""
    found = value
    if isinstance(value, str) and kind is bool:
        found = SWITCHES.get(value.strip().lower(), value)
    elif isinstance(value, str) and kind is not str:
        try:
            found = read_json(value)
        except (ValueError, RecursionError):
            found = value
    accepted = (int, float) if kind is float else (kind,)
    if type(found) not in accepted:
        raise GenerationError(f"option '{name}' is {shown(value)}, expected {WANTED[kind]}")
    return float(found) if kind is float else found


def for_llm(message: str) -> str:
    """A message in one line that names options as `llm` takes them: `-o min_p` for --min-p."""
    return OPTION.sub(_as_option, for_clients(message))


def _as_option(match: re.Match[str]) -> str:
    name = match[2].replace("-", "_")
    if match[1]:
        return f"-o no_{name} true" if f"no_{name}" in NAMES else f"-o {name} false" if name in NAMES else match[0]
    return f"-o {name}" if name in NAMES else match[0]
