"""Prints a text whose tokens are coloured by the domain that most of their experts belong to."""

import sys

from rich.style import Style
from rich.text import Text

from steermoe.cli.terminal.answers import AnswerPrinter
from steermoe.cli.terminal.console import line, note, out, printable, write
from steermoe.engines.request import Request
from steermoe.engines.trace import TokenTrace

COLOURS = ((240, 138, 36), (88, 152, 245), (62, 190, 120), (186, 116, 232), (240, 104, 152), (64, 190, 204))
"""Full colours of domains, red, green and blue; further domains begin again with the first."""
LEAST_SHARE = 0.05
"""A token whose domains got less has no colour."""


class RoutingPrinter:
    """Takes the tokens of a trace as `Request.on_trace`; call `end` after the last one.

    Args:
        request: whose text is printed, after its prompt unless it is a chat.
        streams: print each token when it comes, rather than all at the end.
    """

    def __init__(self, request: Request, streams: bool) -> None:
        self._streams = streams
        self._tokens: list[TokenTrace] = []
        self._names: dict[str, int] = {}
        self._style = Style()
        self._answer = None if request.chat is None else AnswerPrinter(request.chat, print_answer=self._print)
        self._prompt = request.prompt if request.chat is None else ""
        if streams:
            self._print(self._prompt)

    def __call__(self, token: TokenTrace) -> None:
        self._tokens.append(token)
        if self._streams:
            self._show(token)

    def end(self) -> None:
        """Print what was kept, end the line, and say what the colours mean."""
        if not self._streams:
            self._print(self._prompt)
            for token in self._tokens:
                self._show(token)
        self._style = Style()
        if self._answer is not None:
            self._answer.end()
        else:
            self._print("\n")
        self._explain()

    def _show(self, token: TokenTrace) -> None:
        self._style = self._style_of(token)
        (self._print if self._answer is None else self._answer)(token.text)

    def _style_of(self, token: TokenTrace) -> Style:
        for name in token.share:
            self._names.setdefault(name, len(self._names))
        name = max(token.share, key=lambda one: token.share[one], default="")
        if not name or token.share[name] < LEAST_SHARE:
            return Style()
        return style_of(self._names[name], token.share[name])

    def _print(self, text: str) -> None:
        if out.no_color or out.color_system is None:
            write(text)
            return
        out.print(Text(printable(text), style=self._style), end="", soft_wrap=True)
        sys.stdout.flush()

    def _explain(self) -> None:
        """One line on stderr: each domain with its mean share before and now."""
        read = [token for token in self._tokens if token.is_read]
        parts = []
        for name in self._names:
            before, now = (sum(shares[name] for shares in each) / max(1, len(read)) for each in _shares(read, name))
            parts.append(f"{line(name)} {before:.0%} -> {now:.0%}")
        if parts:
            note(f"share of each token's places, without and with steering: {'; '.join(parts)}", "dim")
        else:
            note("no colours: the text is steered toward no domain; name one with --domain", "dim")


def style_of(number: int, share: float) -> Style:
    """Dark letters on the colour of a domain, from white to full."""
    full = COLOURS[number % len(COLOURS)]
    mixed = (round(255 - share * (255 - part)) for part in full)
    return Style(color="#101010", bgcolor=f"#{bytes(mixed).hex()}")


def _shares(tokens: list[TokenTrace], name: str) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The shares of tokens that know of a domain, before and now."""
    known = [token for token in tokens if name in token.share]
    return [token.share_before for token in known], [token.share for token in known]
