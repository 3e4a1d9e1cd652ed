"""A model's tags as tokens: found in its tokenizer and chat template, or made from the texts that a plan gives."""

from collections.abc import Callable, Collection, Iterable
from functools import cached_property
from typing import Any, Protocol

from steermoe.errors import SteeringError, quoted
from steermoe.models.tags import Pair, answer_tags, tool_tags
from steermoe.models.template import think_tags
from steermoe.routing.positions import SEGMENTS, Positions
from steermoe.steering.plans import SteeringPlan
from steermoe.steering.segments import Between, Segments, Tag, Tags, follows_tags

SPACES = "\u2581\u0120"
"""How vocabularies write the space before a word."""


class Vocabulary(Protocol):
    """What is needed of a tokenizer to write tags as tokens.

    Attributes:
        template: the model's chat template; None if it has none.
        special: its special and added tokens, as text, with their numbers.
    """

    @property
    def template(self) -> str | None: ...

    @property
    def special(self) -> dict[str, int]: ...

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text, special ones as such, with nothing before it."""

    def pieces(self) -> list[str]:
        """Every token as the vocabulary writes it."""


class HFVocabulary:
    """As `Vocabulary`, of a transformers tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def template(self) -> str | None:
        found = getattr(self._tokenizer, "chat_template", None)
        if isinstance(found, dict):  # several by name
            found = "\n".join(part for part in found.values() if isinstance(part, str))
        return found if isinstance(found, str) else None

    @cached_property
    def special(self) -> dict[str, int]:
        """As `Vocabulary.special`."""
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        found = {str(getattr(token, "content", token)): int(number) for number, token in added.items()}
        names = [name for name in getattr(self._tokenizer, "all_special_tokens", ()) if name not in found]
        numbers = ((name, self._tokenizer.convert_tokens_to_ids(name)) for name in names)
        return found | {name: int(number) for name, number in numbers if number is not None}

    def tokens(self, text: str) -> list[int]:
        """As `Vocabulary.tokens`."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def pieces(self) -> list[str]:
        """As `Vocabulary.pieces`."""
        names = self._tokenizer.convert_ids_to_tokens(list(range(len(self._tokenizer))))
        return [name or "" for name in names]


class ModelTags:
    """The tags of one model, as each plan needs them.

    Args:
        vocabulary: of the model; None if unknown: then it has no tags of its own.
        ends: gives the tokens that end a turn.
    """

    def __init__(self, vocabulary: Vocabulary | None = None, ends: Callable[[], Collection[int]] = tuple) -> None:
        self._vocabulary, self._ends = vocabulary, ends
        self._found: dict[Pair | None, Tags] = {}

    @classmethod
    def of_tokenizer(cls, tokenizer: Any, ends: Iterable[int] = ()) -> "ModelTags":
        """Those of a transformers tokenizer.

        Args:
            tokenizer: the model's.
            ends: tokens that end a turn, besides its own end token.
        """
        own = getattr(tokenizer, "eos_token_id", None)
        return cls(HFVocabulary(tokenizer), lambda: {*ends, *([] if own is None else [own])})

    @property
    def think(self) -> Pair | None:
        """The texts of the model's own tags around thinking; None if it has none."""
        known = self._vocabulary
        return None if known is None else think_tags(known.template, known.special)

    def of(self, plan: SteeringPlan | None) -> Tags | None:
        """The tags that decide which tokens a plan steers; None if none do.

        Raises:
            SteeringError: it needs tags, and neither the model nor the plan has any.
        """
        if plan is None or not plan.does_something:
            return None
        if plan.think_tags not in self._found:
            self._found[plan.think_tags] = self._make(plan.think_tags)
        tags = self._found[plan.think_tags]
        self._check(plan.positions, tags)
        return tags if follows_tags(plan.positions, tags) else None

    def check(self, positions: Positions, think: Pair | None = None) -> None:
        """Raise if positions follow tags that are not known.

        Args:
            positions: of a plan.
            think: its own tags around thinking.

        Raises:
            SteeringError: they do, with the fix.
        """
        if positions in SEGMENTS:
            self._check(positions, self._make(think))

    def segments(self, plan: SteeringPlan | None, prompt: int) -> Segments | None:
        """What numbers the tokens of a text for a plan; None if their places are enough."""
        tags = self.of(plan)
        return None if tags is None or plan is None else Segments(plan.positions, tags, prompt)

    def _check(self, positions: Positions, tags: Tags) -> None:
        is_found = tags.tool_calls.opens if positions == "tool-calls" else tags.thinking.opens or tags.answer.opens
        if positions not in SEGMENTS or is_found:
            return
        around = "tool calls" if positions == "tool-calls" else "thinking"
        if self._vocabulary is None:
            where, fix = "which model's they are is not known", "pass tokenizer=..."
        elif positions == "tool-calls":
            where, fix = "this model's tokenizer has none as a token", "use positions generated"
        else:
            where, fix = "this model has none", "name them with --think-tags OPEN CLOSE (think_tags in JSON and Python)"
        raise SteeringError(f"positions {positions} follows the tags around a model's {around}, but {where}: {fix}")

    def _make(self, think: Pair | None) -> Tags:
        known = self._vocabulary
        if known is None:
            if think is not None:
                raise SteeringError(f"think_tags {think} can't be written as tokens: pass tokenizer=...")
            return Tags()
        own = self.think
        answers = answer_tags(known.special) if think is None else ()
        return Tags(
            self._between([think or own] if think or own else []),
            self._between(answers),
            self._between(tool_tags(known.special)),
            frozenset(self._ends()),
        )

    def _between(self, pairs: Iterable[Pair | None]) -> Between:
        opens: dict[Tag, None] = {}
        closes: dict[Tag, None] = {}
        for pair in filter(None, pairs):
            opens[self._tag(pair[0])] = None
            if pair[1]:
                closes[self._tag(pair[1])] = None
        return Between(tuple(opens), tuple(closes))

    def _tag(self, text: str) -> Tag:
        """A tag as tokens.

        Where a tag begins or ends with an ordinary token, the model may write that together with what is around it,
        such as a line break, so any token that ends, or begins, with the same letters counts too.

        Raises:
            SteeringError: a text without tokens.
        """
        assert self._vocabulary is not None
        special = self._vocabulary.special
        if text in special:
            return (frozenset([special[text]]),)
        tokens = self._vocabulary.tokens(text)
        names = self._vocabulary.pieces()
        if tokens and not names[tokens[0]].strip(SPACES):  # a space of its own before the first word
            tokens = tokens[1:]
        if not tokens:
            raise SteeringError(f"think tag '{quoted(text)}' has no tokens in this model's vocabulary: give another")
        tag = [frozenset([token]) for token in tokens]
        marks = set(special.values())
        first, last = names[tokens[0]].lstrip(SPACES), names[tokens[-1]]
        last = last.lstrip(SPACES) if len(tokens) == 1 else last
        ordinary = [(number, name) for number, name in enumerate(names) if name and number not in marks]
        if tokens[0] not in marks:
            tag[0] = tag[0] | {number for number, name in ordinary if name.endswith(first)}
        if tokens[-1] not in marks:
            before = SPACES if len(tokens) == 1 else ""
            tag[-1] = tag[-1] | {number for number, name in ordinary if name.lstrip(before).startswith(last)}
        return tuple(tag)
