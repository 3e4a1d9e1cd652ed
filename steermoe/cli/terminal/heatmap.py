"""The map of an expert vector in a terminal: a row per layer, a cell per expert, fuller blocks for larger values.

Knows nothing of files or commands. Shapes: L layers, N experts, C columns of cells; C < N in a narrow terminal.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from steermoe.vectors.vector import SteeringVector

COLOURS = ("cyan", "green", "yellow", "red")
"""Of the levels, from low to high; colours of the terminal's theme, which are readable on any background."""
EMPTY_COLOUR, NEGATIVE_COLOUR = "bright_black", "blue"
TICK_GAP = 4
"""The fewest columns between two numbers of the scale at the top."""


@dataclass(frozen=True)
class Glyphs:
    """The characters of cells: levels from low to high, zero, and below zero."""

    levels: str
    empty: str
    negative: str


UNICODE, ASCII = Glyphs("░▒▓█", "·", "▽"), Glyphs(":*%#", ".", "-")


def draw(vector: "SteeringVector", width: int, ascii_only: bool = False) -> Text:
    """The map with its scale and legend, each line at most `width` wide (down to a few columns).

    Args:
        vector: its E = `vector.experts` is drawn.
        width: columns of the terminal. A cell takes two columns if there is room, else one; if even that is too wide,
            neighbouring experts share a cell, which shows the largest of them, and the legend says so.
        ascii_only: for terminals without block characters.
    """
    glyphs = ASCII if ascii_only else UNICODE
    labels = [str(layer) for layer in vector.layers]
    margin = max(map(len, [*labels, "layer"])) + 1
    room = max(8, width - margin)
    share = -(-vector.num_experts // room)
    cell = 2 if 2 * vector.num_experts <= room else 1
    values_LC = [[_largest(row[i : i + share]) for i in range(0, len(row), share)] for row in vector.experts.tolist()]
    bounds = _level_bounds(values_LC)
    text = Text(f"{'layer':<{margin}}{_scale(len(values_LC[0]), share, cell)}\n", style=EMPTY_COLOUR)
    for label, values in zip(labels, values_LC, strict=True):
        text.append(f"{label:>{margin - 1}} ", style=EMPTY_COLOUR)
        for value in values:
            glyph, colour = _cell(value, bounds, glyphs)
            text.append(glyph * cell, style=colour)
        text.append("\n")
    for line in _legend(vector, bounds, share, glyphs):
        text.append_text(line).append("\n")
    text.rstrip()
    return text


def _largest(values: list[float]) -> float:
    """The value furthest from 0."""
    return max(values, key=abs)


def _level_bounds(values_LC: list[list[float]]) -> list[float]:
    """The upper bounds of the levels, evenly spaced from the smallest to the largest positive value."""
    positive = [value for row in values_LC for value in row if value > 0]
    if not positive:
        return []
    low, high = min(positive), max(positive)
    steps = len(COLOURS) if high > low else 1
    return [low + (high - low) * step / steps for step in range(1, steps)] + [high]


def _cell(value: float, bounds: list[float], glyphs: Glyphs) -> tuple[str, str]:
    if value == 0:
        return glyphs.empty, EMPTY_COLOUR
    if value < 0:
        return glyphs.negative, NEGATIVE_COLOUR
    level = next(number for number, bound in enumerate(bounds) if value <= bound) + len(COLOURS) - len(bounds)
    return glyphs.levels[level], COLOURS[level]


def _scale(columns: int, share: int, cell: int) -> str:
    """The numbers of experts above their columns, as many as fit."""
    step = 1
    while step * cell < max(TICK_GAP, len(str(columns * share)) + 1):
        step *= 2
    return "".join(f"{column * share:<{step * cell}}" for column in range(0, columns, step)).rstrip()


def _legend(vector: "SteeringVector", bounds: list[float], share: int, glyphs: Glyphs) -> list[Text]:
    shades = Text()
    shades.append(glyphs.empty, style=EMPTY_COLOUR).append(f" {_why_empty(vector)}")
    for number, bound in enumerate(bounds):
        level = number + len(COLOURS) - len(bounds)
        shades.append("   ").append(glyphs.levels[level], style=COLOURS[level]).append(f" to {bound:.3g}")
    if (vector.experts < 0).any():
        shades.append("   ").append(glyphs.negative, style=NEGATIVE_COLOUR).append(" below 0")
    kept, total = int((vector.experts != 0).sum()), vector.experts.numel()
    lines = [shades, Text(f"{kept} of {total} experts {'is' if kept == 1 else 'are'} in the vector")]
    if vector.info.top_k:
        lines[-1].append(f"; no frequency exceeds 1/k = {1 / vector.info.top_k:.3g}")
    if share > 1:
        lines.append(Text(f"too many experts for this width: each column shows the largest of {share} neighbours"))
    return lines


def _why_empty(vector: "SteeringVector") -> str:
    if vector.weights is not None:
        return "0"
    if vector.relative:
        return f"up to {vector.threshold:g} x the baseline"
    return f"up to {vector.threshold:g}/{vector.num_experts} = {vector.threshold / vector.num_experts:.3g}"
