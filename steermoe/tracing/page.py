"""A page of traces that opens offline: one text, or an unsteered one beside steered ones, and how they were made."""

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steermoe.engines.request import Completion
from steermoe.engines.trace import Trace
from steermoe.errors import count_of
from steermoe.tracing.view import HERE, fragment, script, style

SHOWN_FIELDS = ("domain", "strength", "formula", "scale", "positions", "schedule", "layers", "force", "ban")
"""The settings of a plan that the page names; the others are in the command."""


@dataclass(frozen=True, eq=False)
class Pane:
    """One text of a page.

    Attributes:
        label: such as "unsteered" or "sport".
        detail: such as "max_scaled, strength 8".
        completion: with a trace.
        trace: the completion's, with the domains that all texts of the page are coloured by.
    """

    label: str
    detail: str
    completion: Completion
    trace: Trace

    @property
    def figures(self) -> str:
        """The text in numbers."""
        trace, completion = self.trace, self.completion
        read = trace.is_read
        parts = [count_of(len(trace), "token")]
        for number, domain in enumerate(trace.domains):
            if read.any():
                now, before = (float(one[read, number].mean()) for one in (trace.share, trace.share_before))
                change = f"{now:.0%}" if abs(now - before) < 0.005 else f"{before:.0%} \u2192 {now:.0%}"
                parts.append(f"{domain.name} {change} of places")
        if read.any() and trace.moved.any():
            parts.append(f"steering filled {float(trace.moved[read].mean()):.0%} of places")
        if len(trace):
            parts.append(f"mean log-probability {float(trace.logprob.mean()):.2f}")
        if completion.seconds > 0:
            parts.append(f"{completion.new_tokens / completion.seconds:.1f} tokens/s")
        return "; ".join(parts)


def panes_of(completions: Sequence[Completion]) -> list[Pane]:
    """The panes of completions of one prompt, each coloured by the domains of all.

    Raises:
        ValueError: one of them has no trace.
    """
    traces = [completion.trace for completion in completions]
    domains = {domain.name: domain for trace in traces if trace is not None for domain in trace.domains}
    panes = []
    for completion, trace in zip(completions, traces, strict=True):
        if trace is None:
            raise ValueError("a completion has no trace: ask for one with Request(..., trace=True)")
        plan = completion.request.plan
        label = "unsteered" if plan is None else plan.vector.domain if plan.vector else "forced experts"
        detail = "" if plan is None else f"{plan.formula}, strength {plan.strength:g}"
        panes.append(Pane(label, detail, completion, trace.with_domains(list(domains.values()))))
    return panes


def page(completions: Sequence[Completion], model: str, command: str = "", engine: str = "", note: str = "") -> str:
    """The whole page, one HTML file that loads nothing.

    Args:
        completions: of one prompt, each with a trace.
        model: its name.
        command: what makes the page again.
        engine: its name.
        note: one line more on how it was made.
    """
    panes = panes_of(completions)
    prompt = completions[0].request.prompt if completions else ""
    css, js = f"{(HERE / 'page.css').read_text(encoding='utf-8')}\n{style()}", script()
    rules = (
        f"default-src 'none'; script-src '{_hash(js)}'; style-src '{_hash(css)}'; base-uri 'none'; form-action 'none'"
    )
    title = f"{' and '.join(dict.fromkeys(pane.label for pane in panes))}: {model}, token by token"
    is_chat = any(completion.request.chat is not None for completion in completions)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{rules}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="steermoe">
<title>{html.escape(title)}</title>
<style>{css}</style>
</head>
<body>
<main>
<h1>{html.escape(title)}</h1>
<p class="lead">{"Message" if is_chat else "Prompt"}: {html.escape(prompt)}</p>
<div class="panes">
{"".join(map(_pane, panes))}</div>
<section>
<h2>How it was made</h2>
{_table(panes, model, engine)}
{f"<p>{html.escape(note)}</p>" if note else ""}{_command(command)}
</section>
</main>
<script>{js}</script>
</body>
</html>
"""


def _command(command: str) -> str:
    return f"<p>The command that makes it again:</p><pre>{html.escape(command)}</pre>" if command else ""


def _pane(pane: Pane) -> str:
    request = pane.completion.request
    prompt = request.prompt if request.chat is None else ""
    return (
        f'<article class="pane"><header><h2>{html.escape(pane.label)}</h2>'
        f'<span class="detail">{html.escape(pane.detail)}</span>'
        f'<p class="figures">{html.escape(pane.figures)}</p></header>\n{fragment(pane.trace, prompt)}</article>\n'
    )


def _table(panes: Sequence[Pane], model: str, engine: str) -> str:
    trace = panes[0].trace
    experts = " or ".join(str(number) for number in sorted(set(trace.experts)))
    shape = f"{count_of(len(trace.layers), 'MoE layer')} of {experts} experts, {trace.chosen.shape[2]} chosen per token"
    rows: dict[str, str] = {"model": f"{model}, {shape}"}
    if engine:
        rows["engine"] = engine
    sampling = panes[0].completion.request.sampling
    rows["sampling"] = ", ".join(f"{name} {value}" for name, value in vars(sampling).items())
    for pane in panes:
        plan = pane.completion.request.plan
        if plan is not None:
            rows[f"plan of {pane.label}" if len(panes) > 1 else "plan"] = _settings(plan.as_dict())
            info = plan.vector.info if plan.vector is not None else None
            if info is not None and (info.title or info.keywords):
                words = ", ".join(info.keywords[:12])
                rows[f"vector {pane.label}"] = f"{info.title}{': ' if info.title and words else ''}{words}"
    lines = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>\n" for name, text in rows.items()
    )
    return f'<div class="wide"><table>\n{lines}</table></div>'


def _settings(plan: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in plan.items()
        if name in SHOWN_FIELDS and value not in (None, [])
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
