"""What a batch generates: prompts, as lines of text or JSON, times domains, times samples. Knows no models.

Nothing is kept: the file is read line by line, twice if need be. An unusable line is a `Problem`, not an error.
"""

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

from steermoe.engines.messages import Message, check_messages, conversation
from steermoe.engines.request import Sampling
from steermoe.errors import BatchError, SteerMoEError, escaped, quoted, shown
from steermoe.steering.resolver import names_of
from steermoe.steering.spec import FIELDS, NO_DOMAIN, SteeringSpec, expected, misfit, read_field, read_json

MAX_LINE = 1 << 20
"""The most bytes of a line: a file without line ends must not fill the memory."""
KEPT_TEXT = 200
"""Characters of a bad line that its `Problem` quotes."""
KEPT_REASON = 500
"""Characters of a reason."""
MOST_STORIES = 100_000
"""Stories of one line: its domains times its samples."""
MOST_DEPTH = 100
"""Lists in lists in a line."""

_MOST_SAMPLES = f"expected 1 or more, and at most {MOST_STORIES} stories of a prompt, samples times domains"

Format = Literal["auto", "text", "jsonl"]


@dataclass(frozen=True)
class BatchSettings:
    """What holds for every line that does not say otherwise.

    Attributes:
        domains: every prompt is continued with each of them: `sport`, a mixture `sport=0.7+food=0.3` or `none`; if
            empty, with `steering` as it is.
        samples: stories per prompt and domain, with consecutive seeds.
        chat: prompts are messages of a user, which the model answers.
        system: the system's message of chats whose line has none; None for what the chat template says, if anything.
        thinking: as in `Engine.chat`.
        special_tokens: as in `Request`.
    """

    steering: SteeringSpec = field(default_factory=SteeringSpec)
    domains: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    samples: int = 1
    chat: bool = False
    system: str | None = None
    thinking: bool | None = None
    special_tokens: bool | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.samples * max(1, len(self.domains)) <= MOST_STORIES:
            raise BatchError(f"samples {self.samples} is out of range: {_MOST_SAMPLES}")

    def steerings(self) -> list[SteeringSpec]:
        """The steerings of a line that names none itself."""
        return [replace(self.steering, domain=(domain,) if domain else ()) for domain in self.domains] or [
            self.steering
        ]


@dataclass(frozen=True)
class Job:
    """One story to generate.

    Attributes:
        line: the line number of its prompt in the file.
        sample: 0 to samples - 1; its seed is in `sampling`.
        id: the id that the line gives; None without one.
        meta: anything that the line wants copied to its story.
        messages: of a chat, whose last one is the prompt; empty if the prompt is to be continued.
        thinking: as in `Engine.chat`.
        special_tokens: as in `Request`.
    """

    line: int
    prompt: str
    steering: SteeringSpec
    sampling: Sampling
    sample: int = 0
    id: str | int | None = None
    meta: Any = None
    messages: tuple[Message, ...] = ()
    thinking: bool | None = None
    special_tokens: bool | None = None


@dataclass(frozen=True)
class Problem:
    """A line, or a story of it, that is skipped.

    Attributes:
        text: the line, or the beginning of a long one.
    """

    line: int
    reason: str
    text: str = ""

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


def one_line(problem: Exception) -> str:
    """An error's message as a `Problem` gives it: printable, on one line, and not too long."""
    return escaped(str(problem)[:KEPT_REASON])


class _BadLine(Exception):
    """Says why a line can't be used; never leaves this file."""


NAMES_A_DOMAIN = b'"domain'
"""In every JSON line that names a domain; the others need not be parsed to find those that do."""


class PromptFile:
    """A file of prompts that can be read several times: a pipe is copied to a temporary file.

    Args:
        path: "-" for stdin. format: "auto" decides by the extension .jsonl, .ndjson or .txt, else by the first line.

    Raises:
        BatchError: it can't be read.
    """

    def __init__(self, path: str | Path, format: Format = "auto") -> None:
        self.name = "stdin" if str(path) == "-" else str(path)
        self._undo = contextlib.ExitStack()
        try:
            if str(path) == "-" and sys.stdin is None:
                raise BatchError("can't read the prompts: stdin is closed; give a file of lines, or pipe one into it")
            if str(path) == "-":
                self._file = self._copied(sys.stdin.buffer)
            else:
                file = self._undo.enter_context(Path(path).open("rb"))  # noqa: SIM115
                self._file = file if Path(path).is_file() else self._copied(file)
        except OSError as error:
            raise BatchError(
                f"can't read the prompts '{self.name}': {error.strerror}; give a file of lines, or - for stdin"
            ) from error
        self.is_json = format == "jsonl" or (format == "auto" and self._looks_like_json())

    def close(self) -> None:
        self._undo.close()

    def _copied(self, source: IO[bytes]) -> Any:
        copy = self._undo.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        shutil.copyfileobj(source, copy)
        return copy

    def _looks_like_json(self) -> bool:
        if self.name.endswith((".jsonl", ".ndjson", ".txt")):
            return not self.name.endswith(".txt")
        first = next((content for _, content in self._lines() if content.strip()), b"")
        try:
            return isinstance(json.loads(first), dict)
        except (ValueError, RecursionError):
            return False

    def jobs(self, settings: BatchSettings) -> Iterator[list[Job] | Problem]:
        """For each line its jobs, or what is wrong with it. Blank lines are skipped."""
        for number, content in self._lines():
            if content.strip():
                yield self._jobs_of(number, content, settings)

    def _jobs_of(self, number: int, content: bytes, settings: BatchSettings) -> list[Job] | Problem:
        try:
            text = _decoded(content)
            given = _parse(text) if self.is_json else {"prompt": text.rstrip("\r\n")}
            return _expand(number, given, settings)
        except (_BadLine, SteerMoEError) as problem:
            text = content[: 4 * KEPT_TEXT].decode(errors="replace")[:KEPT_TEXT]
            return Problem(number, one_line(problem), text)

    def needs(self, settings: BatchSettings, most: int = 100_000) -> tuple[list[str], str]:
        """The domains and vector files that settings and good lines name, and the first prompts in one text.

        Args:
            settings: as for `jobs`.
            most: characters of the prompts.
        """
        names = {name: None for spec in settings.steerings() for name in names_of(spec)}
        prompts: list[str] = []
        left = most
        for number, content in self._lines():
            names_some = self.is_json and NAMES_A_DOMAIN in content
            if left <= 0 and not self.is_json:
                break
            if not content.strip() or (left <= 0 and not names_some):
                continue
            line = self._jobs_of(number, content, settings)
            if isinstance(line, Problem):
                continue
            if left > 0:
                prompts.append(line[0].prompt)
                left -= len(line[0].prompt)
            for spec in dict.fromkeys(job.steering for job in line) if names_some else ():
                with contextlib.suppress(SteerMoEError):
                    names |= dict.fromkeys(names_of(spec))
        return list(names), "\n".join(prompts)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """The lines with their numbers, from 1; of a line that is too long, enough to see that."""
        try:
            self._file.seek(0)
            number = 0
            while content := self._file.readline(MAX_LINE + 1):
                number += 1
                part = content
                while len(part) > MAX_LINE and not part.endswith(b"\n"):
                    part = self._file.readline(MAX_LINE + 1)
                yield number, content.removeprefix(b"\xef\xbb\xbf") if number == 1 else content
        except OSError as error:
            raise BatchError(f"can't read the prompts '{self.name}': {error.strerror}") from error


def _decoded(content: bytes) -> str:
    if len(content) > MAX_LINE and not content.endswith(b"\n"):
        raise _BadLine(f"is longer than {MAX_LINE} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise _BadLine(f"is not UTF-8 (byte {error.start})") from error


# ---- JSON lines ----

STEERING_FIELDS = tuple(one.name for one in FIELDS if one.name != "domain")
SAMPLING_FIELDS = ("seed", *(name for name in Sampling.__dataclass_fields__ if name != "seed"))
_OF_SAMPLING: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    bool: ((bool,), "true or false"),
    float: ((int, float), "a number"),
}

KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "prompt": ((str,), "text"),
    "id": ((str, int), "text or a whole number"),
    "domain": ((str, dict, list), "text, an object of weights, or a list of these"),
    "domains": ((list,), "a list"),
    "samples": ((int,), "a whole number"),
    "messages": ((list,), 'a list such as [{"role": "user", "content": "Hello"}]'),
    **{one.name: (one.metadata["kinds"], one.metadata["wanted"]) for one in FIELDS if one.name != "domain"},
    **{name: _OF_SAMPLING[Sampling.__dataclass_fields__[name].type] for name in SAMPLING_FIELDS},
    "meta": ((object,), "anything"),
}
"""The fields of a JSON line; all but the prompt, or the messages, may be missing or null: then the options decide."""


def _parse(text: str) -> dict[str, Any]:
    try:
        given = read_json(text)
    except RecursionError as error:
        raise _BadLine(f"is not JSON: more than {MOST_DEPTH} lists in each other") from error
    except ValueError as error:
        raise _BadLine(f"is not JSON ({error})") from error
    if not isinstance(given, dict):
        raise _BadLine(f"is of type {type(given).__name__}, not a JSON object")
    if _is_deep(given):
        raise _BadLine(f"has more than {MOST_DEPTH} lists or objects in each other")
    for name, value in given.items():
        if name not in KINDS:
            raise _BadLine(f"has an unknown field '{quoted(name)}': use {', '.join(KINDS)}")
        if value is not None and name != "meta" and (wrong := misfit(name, value, *KINDS[name])):
            raise _BadLine(wrong)
    return {name: value for name, value in given.items() if value is not None or name in ("domain", "meta")}


def _is_deep(value: Any) -> bool:
    """Whether lists and objects are nested deeper than a story can hold them."""
    level = [value]
    for _ in range(MOST_DEPTH):
        inner = [one for one in level if isinstance(one, dict | list)]
        level = [one for each in inner for one in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return False
    return any(isinstance(one, dict | list) for one in level)


def _expand(line: int, given: dict[str, Any], settings: BatchSettings) -> list[Job]:
    prompt, messages = _asked(given, settings)
    texts = (text for message in messages for text in (message.content, message.thinking))
    for text in (prompt, *texts, str(given.get("id", "")), json.dumps(given.get("meta"), ensure_ascii=False)):
        with contextlib.suppress(UnicodeEncodeError):
            text.encode()
            continue
        raise _BadLine("holds half a surrogate pair, which is not text")
    changes = {name: read_field(name, given[name]) for name in STEERING_FIELDS if name in given}
    steerings = [replace(steering, **changes) for steering in _steerings(given, settings)]
    sampling = replace(settings.sampling, **{name: given[name] for name in SAMPLING_FIELDS if name in given})
    samples = given.get("samples", settings.samples)
    if not 1 <= samples * len(steerings) <= MOST_STORIES:
        raise _BadLine(f"samples {samples} is out of range: {_MOST_SAMPLES}")
    return [
        Job(
            line,
            prompt,
            steering,
            replace(sampling, seed=sampling.seed + sample),
            sample,
            given.get("id"),
            given.get("meta"),
            messages,
            settings.thinking if messages else None,
            settings.special_tokens,
        )
        for steering in steerings
        for sample in range(samples)
    ]


def _asked(given: dict[str, Any], settings: BatchSettings) -> tuple[str, tuple[Message, ...]]:
    """The prompt of a line, and the messages if it is a chat."""
    prompt = given.get("prompt")
    if "messages" in given:
        if prompt is not None:
            raise _BadLine("has both 'prompt' and 'messages': give one of them")
        messages = tuple(map(_message, given["messages"]))
        if settings.system is not None and not any(message.role == "system" for message in messages):
            messages = (Message("system", settings.system), *messages)
        check_messages(messages)
        return messages[-1].content, messages
    if prompt is None:
        raise _BadLine("has no field 'prompt'")
    if not prompt.strip():
        raise _BadLine("has an empty prompt")
    return prompt, conversation(prompt, settings.system) if settings.chat else ()


def _message(value: Any) -> Message:
    """A message of a JSON line: its role and content, and perhaps what the model thought."""
    fields = ("role", "content", "thinking")
    is_right = isinstance(value, dict) and {"role", "content"} <= set(value) <= set(fields)
    if not is_right or not all(isinstance(one, str) for one in value.values()):
        raise _BadLine(f"messages: {shown(value)} is none; expected role and content, both text")
    return Message(**value)


def _steerings(given: dict[str, Any], settings: BatchSettings) -> list[SteeringSpec]:
    """The steerings of the settings, with the domains of the line if it names any."""
    if "domain" in given and "domains" in given:
        raise _BadLine("has both 'domain' and 'domains': give one of them")
    if "domain" not in given and "domains" not in given:
        return settings.steerings()
    wanted = given["domain"] if "domain" in given else given["domains"]
    listed = wanted if isinstance(wanted, list) else [wanted]
    if not listed:
        raise _BadLine("has an empty list of domains")
    if len(listed) > MOST_STORIES:
        raise _BadLine(f"has {len(listed)} domains: expected at most {MOST_STORIES}")
    return [replace(settings.steering, domain=_domain(one)) for one in listed]


def _domain(wanted: Any) -> tuple[str, ...]:
    if wanted is None:
        return (NO_DOMAIN,)
    if isinstance(wanted, str | dict) and wanted:
        return read_field("domain", wanted)
    raise _BadLine(expected("domain", wanted))
