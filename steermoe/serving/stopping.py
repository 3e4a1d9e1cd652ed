"""Texts that end another text: found while it comes, and never shown."""

from collections.abc import Sequence


class StopTexts:
    """Holds back what may be the beginning of a stop text.

    Args:
        texts: none of them empty.

    Attributes:
        found: the one that was found; "" if none was.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(texts)
        self._held = ""
        self.found = ""

    def add(self, text: str) -> str:
        """What of the text so far can be shown now; after a stop text nothing more."""
        if self.found or not self._texts:
            return "" if self.found else text
        whole = self._held + text
        places = {stop: whole.find(stop) for stop in self._texts if stop in whole}
        if places:
            self.found = min(places, key=lambda stop: (places[stop], -len(stop)))
            self._held = ""
            return whole[: places[self.found]]
        shown = len(whole) - max(map(len, (_overlap(whole, stop) for stop in self._texts)))
        self._held = whole[shown:]
        return whole[:shown]

    def rest(self) -> str:
        """What is still held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> str:
    """The longest end of a text that a stop text begins with, but not the whole stop text."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return stop[:length]
    return ""
