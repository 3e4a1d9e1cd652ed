"""Draw with matplotlib: imported when first needed, one resolution, files written whole or not at all."""

from pathlib import Path
from typing import Any

from steermoe.errors import SteerMoEError
from steermoe.files import atomic_path, why_not_written

DOTS_PER_INCH = 150


MAX_TICKS = 24


def check_matplotlib() -> None:
    """Fail before long work if its picture could not be drawn.

    Raises:
        SteerMoEError: matplotlib is missing.
    """
    figure_class()


def figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SteerMoEError(f"drawing needs matplotlib ({error}): pip install 'steermoe[plot]'") from error
    return Figure


def save(figure: Any, path: Path) -> None:
    import warnings

    try:
        with warnings.catch_warnings(), atomic_path(path) as partial:
            warnings.filterwarnings("ignore", message="Glyph")  # a script that the font lacks is drawn as boxes
            figure.savefig(partial, format="png", dpi=DOTS_PER_INCH)
    except OSError as error:
        raise SteerMoEError(f"can't write the picture '{path}': {why_not_written(error)}; name another file") from error


def drawable(text: str) -> str:
    """A text as pictures show it: spaces stand for what no font draws."""
    return "".join(char if char.isprintable() else " " for char in text)
