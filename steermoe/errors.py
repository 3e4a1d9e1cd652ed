"""The errors of steermoe. Library code raises them; the command line prints them as one line and exits 1.

    SteerMoEError
    +-- VectorError           a steering vector is invalid: its shape, its values or its file
    |   +-- VectorNotFound    the search path has no file for that domain
    +-- CompatibilityError    a vector does not fit this model
    +-- ModelError            a model can't be found, loaded or assembled
    |   +-- UnsupportedModel  a model has no router that can be steered
    +-- SteeringError         a plan is wrong, or steering that was asked for did not happen
    |   +-- TraceError        what a model's routers chose for each token is not known
    +-- CorpusError           texts can't be read, or their embeddings can't be stored
    +-- BatchError            prompts can't be read, or stories can't be stored
    +-- HubError              the Hub refuses something, or has it not
    |   +-- HubUnreachable    the Hub gives no answer
    +-- GenerationError       a request can't be carried out: empty prompt, prompt longer than the context, ...

Every message names the value, what was expected, and the fix; the functions say how it writes values and counts.
"""

from typing import Any

QUOTED = 60
"""How many characters of a wrong value its message quotes."""


def reason(error: BaseException, most: int = 300) -> str:
    """What an error of another library says, in one line of at most `most` characters; its type if it says nothing."""
    return escaped(" ".join(str(error).split())[:most]) or type(error).__name__


def escaped(text: str) -> str:
    """A text on one line, without characters that a terminal would act on."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def quoted(text: str) -> str:
    """A text as a message quotes it: `escaped`, and cut after `QUOTED` characters."""
    return escaped(text if len(text) <= QUOTED else f"{text[:QUOTED]}...")


def shown(value: Any) -> str:
    """Any value as a message quotes it: as Python writes it, where that is possible."""
    try:
        return quoted(repr(value))
    except (ValueError, RecursionError):  # a number of thousands of digits, or lists in lists in lists
        return f"a {type(value).__name__}"


def count_of(number: int, thing: str) -> str:
    """Such as "1 cluster", "1,436 texts" or "2 stories"."""
    if number == 1:
        return f"1 {thing}"
    return f"{number:,} {thing.removesuffix('y')}ies" if thing == "story" else f"{number:,} {thing}s"


class SteerMoEError(Exception):
    """The root: catch it to catch everything that steermoe raises on purpose."""


class VectorError(SteerMoEError):
    """A steering vector is invalid: its shape, its values or its file."""


class VectorNotFound(VectorError):
    """No vector file of that name is on the search path."""


class CompatibilityError(SteerMoEError):
    """A vector does not fit the model that it should steer."""


class ModelError(SteerMoEError):
    """A model can't be found, loaded or assembled."""


class UnsupportedModel(ModelError):
    """A model has no router that can be steered."""


class SteeringError(SteerMoEError):
    """A steering plan is wrong, or a steering that was asked for did not happen."""


class TraceError(SteeringError):
    """What a model's routers chose, or would have chosen, for each token of a text is not known."""


class CorpusError(SteerMoEError):
    """Texts can't be read as given, or their routing embeddings can't be stored or found."""


class BatchError(SteerMoEError):
    """A file of prompts can't be read, or a file of stories can't be written or resumed."""


class HubError(SteerMoEError):
    """The Hub does not have what was asked for, refuses it, or sends what it should not."""


class HubUnreachable(HubError):
    """The Hub gives no answer, or is not to be asked."""


class GenerationError(SteerMoEError):
    """A request can't be carried out as given."""
