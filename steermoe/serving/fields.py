"""The fields of a request in JSON: read with their types and ranges; whatever is wrong is refused by its name."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from steermoe.errors import SteerMoEError, escaped, quoted, shown
from steermoe.steering.spec import read_json

MOST_STOPS, MOST_STOP = 16, 1000
"""How many texts may end a text, and how many characters each may have."""


class Refused(SteerMoEError):
    """A request that can't be carried out as it is.

    Attributes:
        status: of the answer.
        param: the field that is wrong, if it is one.
        code: OpenAI's name for what is wrong, where it has one.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def parse(body: bytes) -> "Fields":
    """The fields of a body.

    Raises:
        Refused: it is not a JSON object.
    """
    try:
        found = read_json(body.decode())
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON ({escaped(str(error))[:200]}): send an object") from error
    if not isinstance(found, dict):
        raise Refused(f"the body is {shown(found)}: send a JSON object")
    return Fields(found)


FOR_CLIENTS = (
    ("lower --max-new-tokens", "ask for fewer new tokens"),
    ("name them with --think-tags OPEN CLOSE (think_tags in JSON and Python)", "name them in the field think_tags"),
    ("give the beginning of a text to `steermoe generate` without --chat", "let it continue a prompt instead"),
    ("leave out --thinking", "leave thinking out of the request"),
    ("leave out --no-thinking", "leave thinking out of the request"),
)
"""What messages say about options of commands, and what clients of a server can do instead."""


def for_clients(message: str) -> str:
    """A message in one line, without options of commands that its reader does not run."""
    line = " ".join(message.split())
    for option, instead in FOR_CLIENTS:
        line = line.replace(option, instead)
    return line


class Fields:
    """Fields of an object, by name. A field that is null counts as left out.

    Args:
        values: as JSON has them.
        within: the name of the field that holds them; "" for the body.
    """

    def __init__(self, values: Mapping[str, Any], within: str = "") -> None:
        self.values = {name: value for name, value in values.items() if value is not None}
        self._within = within

    def name(self, field: str) -> str:
        """How messages name a field."""
        return f"{self._within}.{field}" if self._within else field

    def get(self, field: str) -> Any:
        return self.values.get(field)

    def wrong(self, field: str, wanted: str) -> Refused:
        """What to raise for a field that is not what was wanted."""
        name = self.name(field)
        return Refused(f"field '{name}' is {shown(self.values.get(field))}, expected {wanted}", param=name)

    def check_names(
        self, known: Collection[str], refused: Mapping[str, Sequence[Any]], ignored: Collection[str] = ()
    ) -> None:
        """Raise Refused for a field that nothing would be done with.

        Args:
            known: fields that are read.
            refused: fields that can't be carried out, each with the values that ask for nothing.
            ignored: fields that change no text.
        """
        for field, value in self.values.items():
            if field in refused:
                if not any(type(value) is type(one) and value == one for one in refused[field]):
                    name = self.name(field)
                    raise Refused(f"field '{quoted(name)}' is not supported here: leave it out", param=name)
            elif field not in known and field not in ignored:
                name = quoted(self.name(field))
                raise Refused(f"field '{name}' is unknown: the fields are {', '.join(sorted(known))}", param=name)

    def whole(self, field: str, least: int, most: int, default: int) -> int:
        value = self.values.get(field, default)
        if type(value) is float and value.is_integer() and abs(value) <= 2**53:
            value = int(value)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(field, f"a whole number from {least} to {most}")
        return value

    def number(self, field: str, least: float, most: float, default: float, *, above: bool = False) -> float:
        """A number from `least`, or `above` it, to `most`."""
        value = self.values.get(field, default)
        is_right = type(value) in (int, float) and least <= value <= most
        if not is_right or (above and value == least):
            raise self.wrong(field, f"a number {'above' if above else 'from'} {least:g} to {most:g}")
        return float(value)

    def flag(self, field: str, default: bool) -> bool:
        value = self.values.get(field, default)
        if type(value) is not bool:
            raise self.wrong(field, "true or false")
        return value

    def text(self, field: str, default: str | None = None) -> str | None:
        value = self.values.get(field, default)
        if value is not None and not isinstance(value, str):
            raise self.wrong(field, "a text")
        return value

    def object(self, field: str) -> "Fields":
        value = self.values.get(field, {})
        if not isinstance(value, dict):
            raise self.wrong(field, "an object")
        return Fields(value, self.name(field))

    def objects(self, field: str) -> list["Fields"]:
        value = self.values.get(field)
        if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
            raise self.wrong(field, "a list of at least one object")
        return [Fields(one, f"{self.name(field)}[{number}]") for number, one in enumerate(value)]

    def texts(self, field: str, most: int) -> list[str]:
        """A text, or a list of 1 to `most` texts."""
        value = self.values.get(field)
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found) or not 1 <= len(found) <= most:
            raise self.wrong(field, f"a text, or a list of 1 to {most} texts")
        return found

    def stop(self, field: str = "stop") -> tuple[str, ...]:
        """The texts that end a text."""
        if self.values.get(field) in (None, []):
            return ()
        found = self.texts(field, MOST_STOPS)
        if not all(1 <= len(one) <= MOST_STOP for one in found):
            raise self.wrong(field, f"texts of 1 to {MOST_STOP} characters")
        return tuple(found)


def dumps(content: Any) -> bytes:
    """JSON, as answers hold it; a text with half a surrogate pair in it is written with escapes."""
    try:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(content, separators=(",", ":")).encode()
