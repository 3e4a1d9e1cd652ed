"""What the page shows of the two texts: tokens in colours while they come, then the view of their trace.

Every text is escaped. The classes are those of `tracing/view.css`.
"""

import html

import numpy as np

from steermoe.engines.trace import TokenTrace
from steermoe.serving.page.session import Run
from steermoe.tracing.view import COLOURS, LEVELS, fragment

HEADS = ("Without steering", "With steering")
EMPTY = (
    "What the model writes when nobody steers it will appear here.",
    "What it writes when its experts for your topic are turned up will appear here.",
)
UNTRACED = "No colours: which experts wrote a word can't be seen in this model."


def empty(side: int) -> str:
    """A side before the first text."""
    return _card(side, "", f'<p class="smt-text sm-empty">{EMPTY[side]}</p>')


def side_of(run: Run, side: int) -> str:
    """One of the texts as far as it has come."""
    text = run.texts[side]
    if text.error:
        return _card(side, "", f'<p class="smt-text sm-error">{html.escape(text.error)}</p>')
    trace = run.trace(side)
    if trace is None or not len(trace):
        figures = _figures(run, text.seen) if run.request.trace else UNTRACED
        return _card(side, figures, _running(run, side))
    hint = '<p class="sm-hint">Click a word to see which experts wrote it.</p>'
    return _card(side, _figures(run, text.seen), fragment(trace, _before(run)) + hint)


def _before(run: Run) -> str:
    """What stands before the texts: the prompt, not a message that is answered."""
    return run.shown_prompt if run.request.chat is None else run.shown_prompt.removeprefix(run.settings.prompt)


def _card(side: int, figures: str, body: str) -> str:
    return f'<div class="sm-card"><h2>{HEADS[side]}</h2><p class="sm-figures">{figures}&nbsp;</p>{body}</div>'


def _running(run: Run, side: int) -> str:
    """The tokens that have come, coloured by the share of the strongest topic, and a cursor."""
    text = run.texts[side]
    spans = "".join(_token(run, token) for token in text.seen)
    rest = text.ticket.text[len("".join(token.text for token in text.seen)) :]
    is_done = text.ticket.is_done
    cursor = "" if is_done else '<span class="sm-cursor"></span>'
    prompt = f'<span class="smt-prompt">{html.escape(_before(run))}</span>'
    return (
        f'<div data-colour="share"><p class="smt-text" aria-busy="{str(not is_done).lower()}">{prompt}{spans}'
        f"{html.escape(rest)}{cursor}</p></div>"
    )


def _token(run: Run, token: TokenTrace) -> str:
    names = "smt-token"
    if run.domains and token.is_read:
        share = run.shares(token)
        domain = int(share.argmax())
        names += f" smt-c{domain % COLOURS} smt-s{round(LEVELS * float(share[domain]))}"
    return f'<span class="{names}">{html.escape(token.text)}</span>'


def _figures(run: Run, seen: list[TokenTrace]) -> str:
    """How many tokens there are, and which share of the work each topic's experts do."""
    parts = [f"{len(seen)} tokens"] if seen else []
    read = [run.shares(token) for token in seen if token.is_read]
    if read and run.domains:
        mean = np.mean(read, axis=0)
        parts += [
            f'<span class="sm-dot smt-c{number % COLOURS}"></span>{html.escape(domain.name)} experts do '
            f"<b>{float(mean[number]):.0%}</b> of the work"
            for number, domain in enumerate(run.domains)
        ]
    return " · ".join(parts)


def vector_map(png: bytes, name: str) -> str:
    """The picture of a vector as HTML."""
    import base64

    data = base64.b64encode(png).decode("ascii")
    return f'<img class="sm-map" alt="map of {html.escape(name)}" src="data:image/png;base64,{data}">'
