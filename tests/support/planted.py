"""Text that a file or an argument may hold, and that must not reach a terminal, a spreadsheet or rich's markup."""

import re

MARKUP = ("[/x]", "[news]", "[bold red]loud[/]", "[link=file:///etc/passwd]here[/link]", ":smile:", "{0} %s \\")
CONTROLS = ("\x1b]0;title\x07", "\x1b[2J\x1b[31m", "\x9b31m", "\x85", "\x7f\x08", "\x00", "\r", "a\nb", "\x0b\x0c")
DIRECTIONS = ("\u202egpj.exe", "\u2066x\u2069", "\u202a\u202d")
UNSEEN = ("\u200b", "a\u200db", "\ufeff", "\u2060", "\u00ad", "\U000e0041", "\u2028")
HALVES = ("\udcff", "\ud800")
ALL = MARKUP + CONTROLS + DIRECTIONS + UNSEEN + HALVES

HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What no output may hold; a terminal's own colours begin with the escape character."""
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


def harm_in(output: str, *, terminal: bool = False) -> list[str]:
    """The harmful characters of an output; in a terminal, those that rich does not need itself."""
    return HARMFUL.findall(COLOURS.sub("", output) if terminal else output)
