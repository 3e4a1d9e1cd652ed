"""Which tokens are meant: what is generated or a part of it, the prompt, or all. Imports no torch."""

from typing import Any, Literal, get_args

Positions = Literal["generated", "prompt", "all", "last-prompt", "thinking", "answer", "tool-calls"]
"""Which tokens are steered. The authors of the method steered generated tokens and left the prompt alone."""
POSITIONS: tuple[Positions, ...] = get_args(Positions)

Recorded = Literal["generated", "prompt", "all"]
"""Which tokens are counted where routing is recorded: those that are known by their place alone."""
RECORDED: tuple[Recorded, ...] = get_args(Recorded)

NOWHERE = -(1 << 40)
"""The number of a generated token that is left alone, wherever it is; far below that of any token of a prompt."""

SEGMENTS: tuple[Positions, ...] = ("thinking", "answer", "tool-calls")
"""Positions that depend on tags among the generated tokens."""

EXTENT: dict[Positions, tuple[str, str, str]] = {
    "generated": ("the first generated token", "the last one that the model reads", "the first generated token"),
    "prompt": ("the first token of the prompt", "its last token", "does not apply"),
    "all": ("the first token of the prompt", "the last one that the model reads", "the first generated token"),
    "last-prompt": (
        "the last token of the prompt, which decides the first generated one",
        "the last one that the model reads",
        "the last token of the prompt",
    ),
    "thinking": (
        "the token after the one that completes the opening tag",
        "the token before the one that completes the closing tag",
        "the first thinking token",
    ),
    "answer": (
        "the token after the one that completes the closing tag; the first generated one if nothing was opened",
        "the last one that the model reads",
        "the first token of the answer",
    ),
    "tool-calls": (
        "the token after the one that completes the opening tag",
        "the token before the one that completes the closing tag",
        "the first token inside a call",
    ),
}
"""The first and the last token that each of them steers, and the token that schedules count as number 0."""


def select(positions: Positions, index: Any) -> Any:
    """Which tokens `positions` selects, bool; `index` is 0 for the first generated token and negative in the prompt.

    Tokens that are left alone, such as those outside of a segment, have the index NOWHERE.

    Args:
        positions: which.
        index: a tensor or an array of any shape; so is the result.
    """
    if positions == "all":
        return index > NOWHERE
    if positions == "prompt":
        return (index < 0) & (index > NOWHERE)
    return index >= (-1 if positions == "last-prompt" else 0)
