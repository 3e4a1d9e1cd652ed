"""Tags around the answers and tool calls of chat models, known by their special tokens. Imports nothing.

`template.think_tags` finds those around thinking.
"""

import re
from collections.abc import Collection

CHANNEL = "<|channel|>"
"""What GPT-OSS writes before the name of a channel; each of its messages is in one."""

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
"""Tags around tool calls; "" where a call goes to the end of the text."""

Pair = tuple[str, str]


def answer_tags(special_tokens: Collection[str]) -> tuple[Pair, ...]:
    """The tags around a model's answers; none if it does not mark them."""
    return tuple(pair for pair in ANSWERS if all(_has(tag, special_tokens) for tag in pair))


def tool_tags(special_tokens: Collection[str]) -> tuple[Pair, ...]:
    """The tags around a model's tool calls, of those that are special or added tokens."""
    return tuple(pair for pair in TOOL_CALLS if all(_has(tag, special_tokens) for tag in pair if tag))


def _has(tag: str, special_tokens: Collection[str]) -> bool:
    """Whether a model has a tag as a token, or as words after and between special tokens."""
    marks = re.findall(r"<\|\w+\|>", tag)
    return tag in special_tokens or (bool(marks) and all(mark in special_tokens for mark in marks))
