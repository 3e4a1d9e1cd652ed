"""The view of one trace as a piece of HTML, an element that any page can hold beside `STYLE` and `SCRIPT`.

The text is in the HTML itself, a span for each token, so that it can be read without scripts. The choices follow as
JSON, with arrays in base64; the script draws from them what a token's experts are. Every text is escaped.
"""

import base64
import html
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steermoe.engines.trace import Trace

HERE = Path(__file__).parent
COLOURS = 8
"""Domains with colours of their own; further ones begin again with the first."""
LEVELS = 10
"""Steps of a colour, from none to full."""
MOST_SURPRISE = 5.0
"""Nats; a token with a log-probability below minus this has the full colour."""
MOST_NARROW = 254
"""Experts of a layer up to which a choice takes one byte, with one number to spare for none."""


@cache
def style() -> str:
    """The style sheet of all views, without a <style> around it."""
    return (HERE / "view.css").read_text(encoding="utf-8")


@cache
def script() -> str:
    """The script of all views, without a <script> around it; it may come before or after them, and more than once."""
    return (HERE / "view.js").read_text(encoding="utf-8")


def fragment(trace: Trace, prompt: str = "") -> str:
    """A trace as an element <steermoe-trace>, for a page that has `style` and `script`.

    It works too where it is put into a page that is there already. Where a reader holds a token, the element sends an
    event "steermoe-token" that bubbles, with the token's number in `event.detail.number`.

    Args:
        trace: with the domains that colour it (`Trace.with_domains`).
        prompt: shown before the text, in grey.
    """
    first = "share" if trace.domains else "moved" if trace.moved.any() else "surprise"
    text = f'<span class="smt-prompt">{html.escape(prompt)}</span>' if prompt else ""
    return (
        f'<steermoe-trace data-colour="{first}">'
        f'<div class="smt-bar">{_modes(trace, first)}{_keys(trace, first)}</div>'
        f'<div class="smt-sides"><p class="smt-text" role="group" aria-label="text, token by token">'
        f"{text}{_tokens(trace)}</p>"
        f'<div class="smt-panel"><p class="smt-hint">Experts are shown where scripts may run.</p></div></div>'
        f'<script type="application/json">{_block(trace)}</script></steermoe-trace>'
    )


def _modes(trace: Trace, first: str) -> str:
    """The buttons that choose what colours mean."""
    modes = {"share": "domain", "moved": "moved by steering", "surprise": "surprise"}
    if not trace.domains:
        del modes["share"]
    if not trace.moved.any():
        del modes["moved"]
    buttons = "".join(
        f'<button type="button" value="{name}" aria-pressed="{str(name == first).lower()}">{words}</button>'
        for name, words in modes.items()
    )
    return f'<span class="smt-modes" role="group" aria-label="colour of tokens" hidden>{buttons}</span>'


def _keys(trace: Trace, first: str) -> str:
    """What the colours mean."""
    keys = [("share", f"smt-c{n % COLOURS}", f"{one.name}: 0 to 100% of places") for n, one in enumerate(trace.domains)]
    keys += [("moved", "smt-key-moved", "0 to 100% of places filled by steering")]
    keys += [("surprise", "smt-key-surprise", f"probability 100% to {math.exp(-MOST_SURPRISE):.1%}")]
    return "".join(
        f'<span class="smt-key" data-for="{mode}"{"" if mode == first else " hidden"}>'
        f'<span class="smt-ramp {colour}"></span>{html.escape(words)}</span>'
        for mode, colour, words in keys
    )


def _tokens(trace: Trace) -> str:
    """A span for each token, with classes for what it may be coloured by."""
    moved, is_read = trace.moved, trace.is_read
    parts = []
    for number, text in enumerate(trace.tokens):
        names = ["smt-token"]
        if trace.domains:
            domain = int(trace.share[number].argmax())
            names += [f"smt-c{domain % COLOURS}", f"smt-s{_level(trace.share[number, domain])}"]
        names += [f"smt-m{_level(moved[number])}", f"smt-p{_level(-trace.logprob[number] / MOST_SURPRISE)}"]
        names += ([] if is_read[number] else ["smt-unread"]) + ([] if text else ["smt-part"])
        parts.append(f'<span class="{" ".join(names)}" tabindex="-1">{html.escape(text)}</span>')
    return "".join(parts)


def _level(share: float) -> int:
    return round(LEVELS * min(1.0, max(0.0, float(share))))


def _block(trace: Trace) -> str:
    wide = max(trace.experts) > MOST_NARROW
    is_same = np.array_equal(trace.chosen, trace.unsteered)
    data: dict[str, Any] = {
        "tokens": trace.tokens,
        "logprob": [round(float(one), 3) for one in trace.logprob],
        "strength": [round(float(one), 4) for one in trace.strength],
        "layers": trace.layers,
        "experts": trace.experts,
        "top_k": trace.chosen.shape[2],
        "wide": wide,
        "chosen": _packed(trace.chosen, wide),
        "unsteered": None if is_same else _packed(trace.unsteered, wide),
        "domains": [
            {"name": domain.name, "experts": _base64(np.packbits(domain.experts.ravel()))} for domain in trace.domains
        ],
    }
    return _json(data)


def _packed(chosen: NDArray[np.int32], wide: bool) -> str:
    return _base64((chosen + 1).astype("<u2" if wide else "u1"))


def _base64(array: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def _json(data: Any) -> str:
    """JSON that can stand inside any element: nothing in it ends a script or begins a comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.translate({ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"})
