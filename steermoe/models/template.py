"""Tags in what chat models write: around their thinking, their answer and their tool calls. Imports nothing.

What a model's own tags are follows from its special tokens and its chat template.
"""

import re
from collections.abc import Collection

CHANNEL = "<|channel|>"
"""What GPT-OSS writes before the name of a channel; each of its messages is in one."""

THINKING = (
    ("<think>", "</think>"),
    (f"{CHANNEL}analysis<|message|>", "<|end|>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
)
"""Opening and closing tags of thinking, the most usual first."""

ANSWERS = ((f"{CHANNEL}final<|message|>", "<|end|>"),)
"""Tags around answers, in models that mark them; in the others, an answer is what is outside of everything else."""

TOOL_CALLS = (
    ("<tool_call>", "</tool_call>"),
    ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    ("<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581calls\u2581end\uff5c>"),
    ("<|START_ACTION|>", "<|END_ACTION|>"),
    ("<longcat_tool_call>", "</longcat_tool_call>"),
    ("<minimax:tool_call>", "</minimax:tool_call>"),
    (f"{CHANNEL}commentary", "<|call|>"),
    (f"{CHANNEL}commentary", "<|end|>"),
    ("[TOOL_CALLS]", ""),
    ("<|python_tag|>", ""),
)
"""Tags around tool calls; "" where a call goes on to the end of the text."""

Pair = tuple[str, str]


def think_tags(template: str | None, special_tokens: Collection[str]) -> Pair | None:
    """The opening and closing tag of a model's thinking; None if it has none.

    Args:
        template: its chat template.
        special_tokens: its special and added tokens, as text.
    """
    return next((pair for pair in THINKING if all(_has(tag, template, special_tokens) for tag in pair)), None)


def answer_tags(special_tokens: Collection[str]) -> tuple[Pair, ...]:
    """The tags around a model's answers; none if it does not mark them."""
    return tuple(pair for pair in ANSWERS if all(_has(tag, None, special_tokens) for tag in pair))


def tool_tags(special_tokens: Collection[str]) -> tuple[Pair, ...]:
    """The tags around a model's tool calls, of those that are special or added tokens."""
    return tuple(pair for pair in TOOL_CALLS if all(_has(tag, None, special_tokens) for tag in pair if tag))


def _has(tag: str, template: str | None, special_tokens: Collection[str]) -> bool:
    """Whether a model knows a tag: as a token, in its template, or as words between special tokens."""
    if tag in special_tokens or (template is not None and tag in template):
        return True
    marks = re.findall(r"<\|\w+\|>", tag)
    return bool(marks) and all(mark in special_tokens for mark in marks)
