"""Steering in the requests of servers: in a model's name, a field of its own, or where a protocol keeps extensions."""

from collections.abc import Mapping, Sequence
from typing import Any

from steermoe.errors import SteeringError, quoted, shown
from steermoe.steering.spec import SteeringSpec, expected, read_json, read_spec

KEY = "steering"
"""The name of the field, wherever it is."""
EXTENSIONS = ("vllm_xargs", "options")
"""Fields that hold extensions: vLLM's and Ollama's."""


def spec_of_name(name: str, served: Sequence[str]) -> tuple[str, dict[str, Any]] | None:
    """The served model and the spec of a name such as "smollm2-moe:sport=4,food=1"; None if it names no steering.

    A weight is what it is for `--domain`: the share in a mixture, or with one domain a multiple of its own strength.

    Raises:
        SteeringError: the name ends at the colon, or a domain is missing.
    """
    for base in sorted(served, key=len, reverse=True):
        if name.startswith(f"{base}:") and name not in served:
            domains = [part.strip() for part in name[len(base) + 1 :].split(",")]
            if not all(domains):
                raise SteeringError(
                    f"model '{quoted(name)}' names no domain after its colon: write, for example, {base}:sport"
                )
            return base, {"domain": domains}
    return None


def asked_spec(asked: Mapping[str, Any], served: Sequence[str]) -> tuple[str | None, Any]:
    """The served model that a request names, and the spec that it asks for, for `read_asked`.

    Args:
        asked: the request.
        served: names of models that can be asked for.

    Returns:
        The model is None if its name holds no steering; the spec is None if none is asked for.

    Raises:
        SteeringError: it asks for steering in several places.
    """
    name = asked.get("model")
    found = spec_of_name(name, served) if isinstance(name, str) else None
    places = {} if found is None else {f"model '{quoted(str(name))}'": found[1]}
    if asked.get(KEY) is not None:
        places[f"the field '{KEY}'"] = asked[KEY]
    for extension in EXTENSIONS:
        held = asked.get(extension)
        if isinstance(held, Mapping) and held.get(KEY) is not None:
            places[f"{extension}"] = held[KEY]
    if len(places) > 1:
        first, second, *_ = places
        raise SteeringError(f"both {first} and {second} ask for steering: leave one of them out")
    return None if found is None else found[0], next(iter(places.values()), None)


def read_asked(spec: Any) -> Any:
    """A spec as `read_spec` takes it: text that is no JSON is a domain as after a model's name, "sport=0.7,food=0.3".

    Raises:
        SteeringError: text that names no domain.
    """
    if not isinstance(spec, str) or spec.lstrip().startswith(("{", "[", '"')):
        return spec
    domains = [part.strip() for part in spec.split(",")]
    if not all(domains):
        raise SteeringError(f'{shown(spec)} names no domain: write a name such as "sport", or an object of fields')
    return {"domain": domains}


def spec_of_options(options: Mapping[str, Any]) -> SteeringSpec:
    """A spec from the options of another program, which are text, such as "0.5", or values of Python.

    Text is read as JSON where a field takes no text. Where it takes a list, commas separate: "sport=0.7,food=0.3".

    Raises:
        SteeringError: a field does not accept its value, or they ask for nothing.
    """
    return read_spec({name: _of_text(name, value) for name, value in options.items()})


def _of_text(name: str, value: Any) -> Any:
    """The value of a field in JSON."""
    if not isinstance(value, str):
        return value
    if name == "domain":
        asked = read_asked(value)
        return _read(name, asked) if isinstance(asked, str) else asked["domain"]
    kinds = SteeringSpec.__dataclass_fields__[name].metadata["kinds"]
    if str in kinds:
        return value
    if list in kinds and not value.lstrip().startswith("["):
        return [part.strip() for part in value.split(",")]
    return _read(name, value)


def _read(name: str, text: str) -> Any:
    """JSON in the text of a field.

    Raises:
        SteeringError: it is none.
    """
    try:
        return read_json(text)
    except (ValueError, RecursionError) as error:
        raise SteeringError(expected(name, text)) from error
