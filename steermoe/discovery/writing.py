"""The model writes texts about a topic, from requests of several kinds, while its routing is recorded; resumable.

An instruct model is asked, by its chat template; a base model continues openings that name the topic. Only the tokens
that the model wrote count, not those of the request: these name the topic in the same words each time.

Shapes: B texts, L MoE layers, N experts per layer.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from steermoe.discovery.embedder import RoutingSource, TextProgress
from steermoe.discovery.packaged import DATA, Language, TextLanguage
from steermoe.engines.engine import Engine
from steermoe.engines.messages import Chat, conversation
from steermoe.engines.request import Completion, Request, Sampling
from steermoe.engines.text import without_hints
from steermoe.errors import GenerationError, VectorError, quoted
from steermoe.files import atomic_path, cache_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

Style = Literal["chat", "openings"]
"""How a model is brought to write: by messages that it answers, or by openings that it continues."""

ROWS, ROWS_ON_GPU = 8, 32
"""Texts that are written together, and so the most that an interruption costs."""
LEAST_TOKENS = 8
"""A shorter text says nothing about a topic."""
GRAM, MOST_REPEATED = 4, 0.5
"""A text is a loop if more than this share of its 4-grams of tokens have occurred before."""
REFUSAL = re.compile(
    r"\W*(?:"
    r"(?:i['’]?m |i am )?(?:very |so )?sorry\b[^.]{0,40}\bi (?:can|am|do|have)"
    r"|i (?:can(?:no|['’])t|am unable|am not able|do not have|don['’]t have)\b"
    r"|as an? (?:ai|language model)\b"
    r"|(?:извините|простите|к сожалению)\b[^.]{0,20}\bя\b|я не (?:могу|умею)\b|как языковая модель\b)",
    re.IGNORECASE,
)
"""How an answer begins that refuses the request."""
MOST_TOPIC = 200


@dataclass(frozen=True)
class Writing:
    """How many texts are written, and how.

    Attributes:
        texts: about each topic, and about other things.
        new_tokens: of a text, at most.
        temperature: at which tokens are drawn.
        seed: of the first text; each further one has the next.
    """

    texts: int = 32
    new_tokens: int = 80
    temperature: float = 0.8
    seed: int = 0


@dataclass(frozen=True)
class Ask:
    """One request: what is sent to the model, and the words in which it names its topic."""

    style: Style
    words: str
    seed: int


@dataclass(frozen=True, eq=False)
class Written:
    """A text that the model wrote.

    Attributes:
        ask: what it was written for.
        text: the model's own words.
        tokens: their number.
        fault: "empty", "loop" or "refusal" for one that is of no use, else "".
        frequency: routing embedding F [L, N] of its tokens; None if there are none.
    """

    ask: Ask
    text: str
    tokens: int
    fault: str
    frequency: Tensor | None

    def as_dict(self) -> dict[str, Any]:
        """One object for JSON lines."""
        return {"request": self.ask.words, "text": self.text, "seed": self.ask.seed, "fault": self.fault or None}


# ---- requests ----


def check_topic(topic: str) -> str:
    """The topic on one line, if it is one.

    Raises:
        VectorError: it is empty or too long, or no text.
    """
    words = " ".join(topic.split())
    if words and not any(char.isalnum() for char in words):
        raise VectorError(
            f"the topic '{quoted(words)}' has no letters: name it in words, such as --topic 'pirates at sea'"
        )
    if not any(char.isalnum() for char in words):
        raise VectorError("the topic is empty: name one in words, such as --topic 'pirates at sea'")
    if len(words) > MOST_TOPIC:
        raise VectorError(
            f"the topic has {len(words)} characters, at most {MOST_TOPIC} are allowed: name it in few words"
        )
    if not words.isprintable():
        raise VectorError(f"the topic {words!r} holds characters that can't be printed: remove them")
    return words


def asks_about(topic: str | None, writing: Writing, style: Style, language: Language) -> list[Ask]:
    """Requests about a topic, of all kinds in turn; about other things, each another one, if it is None."""
    languages: tuple[TextLanguage, ...] = ("en", "ru") if language == "both" else (language,)
    found = []
    for number in range(writing.texts):
        spoken = languages[number % len(languages)]
        place = number // len(languages)
        kinds, others = kinds_of(spoken), other_subjects(spoken)
        kind = kinds[place % len(kinds)]["ask" if style == "chat" else "open"]
        subject = others[place % len(others)] if topic is None else topic
        found.append(Ask(style, kind.replace("{topic}", subject), writing.seed + number))
    return found


@cache
def kinds_of(language: TextLanguage) -> "list[Mapping[str, str]]":
    """The kinds of texts: "ask" for a model that answers, "open" for one that continues; both name a {topic}."""
    lines = (DATA / language / "requests.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@cache
def other_subjects(language: TextLanguage) -> list[str]:
    """What the texts about other things are about."""
    return (DATA / language / "subjects.txt").read_text(encoding="utf-8").splitlines()


# ---- the model ----


def engine_of(source: RoutingSource) -> Engine:
    """An engine that generates with a model and can record its routing."""
    from steermoe.models.loading import LoadedModel

    if not isinstance(source, LoadedModel):
        return source
    from steermoe.engines.hf.engine import HFEngine

    return HFEngine(source, compiled=False)


def style_of(source: RoutingSource) -> Style:
    """Whether a model can be asked: only with a chat template."""
    template = getattr(getattr(source, "tokenizer", None), "chat_template", None)  # a method of llama.cpp's tokenizer
    return "chat" if (template() if callable(template) else template) else "openings"


def _request(engine: Engine, ask: Ask, writing: Writing) -> Request:
    sampling = Sampling(max_new_tokens=writing.new_tokens, temperature=writing.temperature, seed=ask.seed)
    if ask.style == "openings":
        return Request(ask.words, None, sampling)
    try:
        chat = _without_thinking(engine, ask.words)
    except GenerationError as error:
        raise GenerationError(f"{error}; or build the vector from texts of your own, with --texts") from error
    return Request(chat.prompt, None, sampling, chat=chat)


def _without_thinking(engine: Engine, words: str) -> Chat:
    """What the model reads to answer at once; if its template has no switch for thinking, as it does by default."""
    messages = conversation(words)
    try:
        return engine.chat(messages, thinking=False)
    except GenerationError:
        return engine.chat(messages)


# ---- writing ----


def write(
    source: RoutingSource, asks: Sequence[Ask], writing: Writing, progress: TextProgress | None = None
) -> list[Written]:
    """What the model writes for each request; what an earlier call wrote for the same ones is read instead.

    Texts are kept in the user's cache as they come, `ROWS` at a time.

    Args:
        source: the model, with no steering attached.
        asks: the requests.
        writing: how.
        progress: called with texts and tokens done.

    Raises:
        GenerationError: a chat template that can't render them, or a context that is too small.
        SteerMoEError: the cache can't be written.
    """
    engine = engine_of(source)
    folder, rows = work_folder(source, asks, writing), ROWS if engine.most_rows <= 128 else ROWS_ON_GPU
    written: list[Written] = []
    for start in range(0, len(asks), rows):
        part, path = asks[start : start + rows], folder / f"{start:04}.safetensors"
        done = _read(path, part)
        if done is None:
            with without_hints():
                requests = [_request(engine, ask, writing) for ask in part]
                completions = engine.generate(requests, record=True)
            done = [_judged(ask, completion) for ask, completion in zip(part, completions, strict=True)]
            _keep(path, done)
        written += done
        if progress is not None:
            progress(len(done), sum(one.tokens for one in done))
    return written


def work_folder(source: RoutingSource, asks: Sequence[Ask], writing: Writing) -> Path:
    """Where texts are kept while they are written: another model, request or sampling, another folder."""
    engine = engine_of(source)
    content = [engine.fingerprint(), engine.dtype, repr(writing), *map(repr, asks)]
    return cache_folder() / "topics" / hashlib.sha256("\n".join(content).encode()).hexdigest()[:16]


def _judged(ask: Ask, completion: Completion) -> Written:
    text = completion.text.strip()
    return Written(ask, text, completion.new_tokens, fault_of(text, completion.token_ids), completion.frequency)


def fault_of(text: str, tokens: Sequence[int]) -> str:
    """Why a text is of no use: "empty", "loop" or "refusal"; "" for one that is."""
    if len(tokens) < LEAST_TOKENS or not any(map(str.isalpha, text)):
        return "empty"
    grams = [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
    if len(set(grams)) < (1 - MOST_REPEATED) * len(grams):
        return "loop"
    return "refusal" if REFUSAL.match(text) else ""


def usable(written: Sequence[Written], about: str, model: str) -> tuple[list[Written], str]:
    """The texts that are of use, and a remark on the others, or "".

    Raises:
        VectorError: none is.
    """
    good = [one for one in written if not one.fault and one.frequency is not None]
    faults = Counter(one.fault or "empty" for one in written if one.fault or one.frequency is None)
    names = {"empty": "empty", "loop": "repeat themselves", "refusal": "refuse"}
    listed = ", ".join(f"{count} {names[fault]}" for fault, count in sorted(faults.items()))
    if not good:
        raise VectorError(
            f"{model} wrote nothing about {about} that is of use ({listed}): word the topic in another way, or build "
            "the vector from texts of your own, with --texts"
        )
    return (
        good,
        f"{len(written) - len(good)} of {len(written)} texts about {about} are left out ({listed})" if faults else "",
    )


def _keep(path: Path, written: Sequence[Written]) -> None:
    """Write a part whole or not at all; a disk that is full costs only what could have been resumed."""
    from safetensors.torch import save

    records = [
        {"words": one.ask.words, "seed": one.ask.seed, "text": one.text, "tokens": one.tokens, "fault": one.fault}
        for one in written
    ]
    tensors = {str(number): one.frequency for number, one in enumerate(written) if one.frequency is not None}
    content = save({**tensors, "written": torch.tensor([len(written)])}, {"records": json.dumps(records)})
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as partial:
            partial.write_bytes(content)


def _read(path: Path, asks: Sequence[Ask]) -> list[Written] | None:
    """A part that was written earlier; None if there is none, or if it is damaged: then it is written again."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            records = json.loads((file.metadata() or {})["records"])
            keys = set(file.keys())
            if [(one["words"], one["seed"]) for one in records] != [(ask.words, ask.seed) for ask in asks]:
                return None
            return [
                Written(
                    ask,
                    str(one["text"]),
                    int(one["tokens"]),
                    str(one["fault"]),
                    file.get_tensor(str(number)) if str(number) in keys else None,
                )
                for number, (ask, one) in enumerate(zip(asks, records, strict=True))
            ]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
