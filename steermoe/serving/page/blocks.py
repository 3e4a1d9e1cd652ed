"""The page in Gradio: what each widget does. Mounted beside the API, in the same process."""

import html
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from steermoe.errors import SteerMoEError
from steermoe.serving.page import exports, presets, view
from steermoe.serving.page.building import Progress, Topics, watched
from steermoe.serving.page.session import Run, Session, Sessions
from steermoe.serving.page.settings import Settings, from_values
from steermoe.serving.page.widgets import ABOUT, CHAT, PASTED, SLOTS, STORY, make
from steermoe.serving.service import Service
from steermoe.tracing.page import page as trace_page
from steermoe.tracing.view import script, style

EVERY = 0.1
"""Seconds between two looks at the texts."""
TITLE = "steermoe: steer a language model while it writes"
QUIETLY: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
"""Events that run beside each other, whatever else is running."""
CHANGED = (
    "Sliders were moved while it was being written: the plan is the one that it began with, and no command makes it "
    "again."
)
CONTINUED = "It was written on from a word of an earlier text, so no command makes it again."
TO_LINK = "(query) => location.origin + location.pathname + '?' + query"
TO_FILE = """(page) => {
  if (!page) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([page], { type: "text/html" }));
  link.download = "steermoe.html";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}"""


def css() -> str:
    """The style of the page and of traces, whose colours hold in the cards around them, too."""
    own = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    return f"{style().replace('steermoe-trace', ':is(steermoe-trace, .sm-card)')}\n{own}"


def head() -> str:
    """What the page has in its <head>."""
    return f'<meta name="referrer" content="same-origin"><script>{script()}</script>'


def theme() -> gr.themes.Base:
    """A theme whose fonts are the system's, so that no page asks another host for one."""
    return gr.themes.Soft(
        primary_hue="orange",
        neutral_hue="slate",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
        spacing_size="sm",
        radius_size="md",
    ).set(
        block_title_background_fill="none",
        block_title_background_fill_dark="none",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_title_text_weight="550",
        block_title_padding="0",
    )


class Page:
    """The page of a service.

    Args:
        service: what generates and steers.
        model: how commands name the model; by default as the service does.
        builder: builds vectors of new topics; without it there are none.
    """

    def __init__(self, service: Service, model: str | None = None, builder: Topics | None = None) -> None:
        self._live, self._resolver = service.live, service.steering.resolver
        self._name, self._model = service.steering.served, model or service.steering.served
        self._can_chat = service.can_chat
        self.sessions = Sessions(lambda: Session(self._live, self._resolver))
        self._builder = builder
        self._work: dict[str, Progress] = {}

    def blocks(self) -> gr.Blocks:
        """The page, for `gr.mount_gradio_app`."""
        topics = self.topics()
        with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
            known, can_build = list(presets.fitting(topics)), self._builder is not None
            self._w = make(presets.first(topics), topics, known, self._name, self._can_chat, can_build)
            self._wire_texts()
            self._wire_building()
            self._wire_exports()
            shown = [*self._w.settings.values(), *self._w.amounts, self._w.names, self._w["mapped"]]
            blocks.load(self._on_load, self._w["query"], shown, js="() => location.search", **QUIETLY)
            blocks.unload(self._on_leave)
        return blocks

    def topics(self) -> list[str]:
        """The topics that the model has vectors of, as many as there are sliders."""
        return self._resolver.domains()[:SLOTS]

    # ---- texts ----

    def _wire_texts(self) -> None:
        w, both = self._w, self._w.sides
        outputs = [*both, w["branch"], w.picked]
        for name, button in w.presets.items():
            chosen = button.click(
                partial(self._on_preset, name), w.names, [*w.settings.values(), *w.amounts], queue=False, **QUIETLY
            )
            chosen.then(self._on_write, w.controls, outputs, trigger_mode="multiple", **QUIETLY)
        gr.on(
            [w["write"].click, w["prompt"].submit],
            self._on_write,
            w.controls,
            outputs,
            trigger_mode="multiple",
            **QUIETLY,
        )
        w["stop"].click(self._on_stop, None, None, queue=False, **QUIETLY)
        w["branch"].click(self._on_branch, w.controls, outputs, trigger_mode="multiple", **QUIETLY)
        for side, tokens in enumerate(both):
            tokens.token(self._picker(side), None, [w["branch"], w.picked], queue=False, **QUIETLY)
        live = ("strength", "formula", "scale", "positions", "schedule", "layers")
        for widget in [*w.amounts, *(w[name] for name in live)]:
            is_text = isinstance(widget, gr.Textbox)
            event = widget.submit if is_text else widget.input
            event(self._on_steer, w.controls, None, queue=False, trigger_mode="always_last", **QUIETLY)

    def _settings(self, data: dict[Any, Any]) -> Settings:
        w = self._w
        values = [data[widget] for widget in w.settings.values()]
        named = dict(zip(w.settings, values, strict=True))
        named["is_chat"] = named["is_chat"] == CHAT
        return from_values([named[name] for name in ORDER], data[w.names], [data[slider] for slider in w.amounts])

    def _on_write(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Any]:
        session = self.sessions.of(request.session_hash or "")
        yield from self._begun(session, lambda: session.start(self._settings(data)))

    def _on_branch(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Any]:
        session = self.sessions.of(request.session_hash or "")
        side, number = data[self._w.picked] or (1, -1)
        yield from self._begun(session, lambda: session.branch(side, number, self._settings(data)))

    def _begun(self, session: Session, begin: Any) -> Iterator[Any]:
        """Begin two texts and show them as they come, until others begin."""
        try:
            run: Run = begin()
        except SteerMoEError as error:
            raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from None
        hidden = gr.Button(visible=False)
        while session.run is run:
            is_done = run.is_done
            if is_done and (again := session.without_trace(run)) is not None:
                run = again
                continue
            yield view.side_of(run, 0), view.side_of(run, 1), hidden, None
            if is_done:
                return
            time.sleep(EVERY)

    def _on_stop(self, request: gr.Request) -> None:
        self.sessions.of(request.session_hash or "").stop()

    def _on_leave(self, request: gr.Request) -> None:
        self.sessions.end(request.session_hash or "")

    def _on_steer(self, data: dict[Any, Any], request: gr.Request) -> None:
        session = self.sessions.of(request.session_hash or "")
        try:
            session.steer(self._settings(data))
        except SteerMoEError as error:
            gr.Warning(html.escape(str(error), quote=False))

    def _picker(self, side: int) -> Callable[..., Any]:
        """What is done about a click on a token of one side; Gradio reads its annotations, which a partial has not."""

        def picked(event: gr.EventData, request: gr.Request) -> Any:
            return self._on_token(side, event, request)

        return picked

    def _on_token(self, side: int, event: gr.EventData, request: gr.Request) -> Any:
        """A token was clicked: offer to write on from it."""
        number = int(event.number)
        run = self.sessions.of(request.session_hash or "").run
        trace = None if run is None else run.trace(side)
        if trace is None or not 0 <= number < len(trace):
            return gr.Button(visible=False), None
        word = trace.tokens[number].strip() or "here"
        return gr.Button(f"Write on after \u201c{word[:40]}\u201d", visible=True), (side, number)

    def _on_preset(self, name: str, names: list[str]) -> list[Any]:
        return self._values(presets.PRESETS[name], names)

    def _values(self, settings: Settings, names: list[str]) -> list[Any]:
        """What the widgets show of settings, amounts last."""
        shown: list[Any] = []
        for field in self._w.settings:
            value = getattr(settings, field)
            if field == "is_chat":
                value = CHAT if value and self._can_chat else STORY
            shown.append("automatic" if value is None else value)
        amounts = [settings.amounts.get(name, 0) for name in names]
        return [*shown, *amounts, *[0] * (SLOTS - len(names))]

    def _on_load(self, query: str) -> list[Any]:
        """Show what a link says, and the topics that there are by now."""
        topics = self.topics()
        settings = presets.first(topics)
        try:
            settings = settings.updated(query.removeprefix("?"))
            if unknown := [name for name in settings.weights if name not in topics]:
                gr.Warning(
                    html.escape(f"this model has no topic {', '.join(unknown)[:200]}: add it below", quote=False)
                )
        except SteerMoEError as error:
            gr.Warning(html.escape(f"the link can't be read: {error}", quote=False))
        return [*self._shown(settings, topics), topics, gr.Dropdown(choices=topics, value=None)]

    def _shown(self, settings: Settings, topics: list[str]) -> list[Any]:
        values = self._values(settings, topics)
        count = len(self._w.settings)
        return [*values[:count], *self._sliders(values[count:], topics)]

    def _sliders(self, amounts: list[float], topics: list[str]) -> list[Any]:
        named = [*topics, *[""] * (SLOTS - len(topics))]
        return [
            gr.Slider(value=amount, label=name or "topic", visible=bool(name))
            for amount, name in zip(amounts, named, strict=True)
        ]

    # ---- new topics ----

    def _wire_building(self) -> None:
        w = self._w
        w["kind"].input(self._on_kind, w["kind"], [w["topic"], w["texts"]], queue=False, **QUIETLY)
        w["build"].click(
            self._on_build,
            [w["kind"], w["topic"], w["texts"], w.names],
            [w["progress"], w.names, w["mapped"], *w.amounts],
            **QUIETLY,
        )
        w["halt"].click(self._on_halt, None, None, queue=False, **QUIETLY)
        w["mapped"].input(self._on_map, w["mapped"], w["map"], **QUIETLY)

    def _on_kind(self, kind: str) -> Any:
        return gr.Textbox(info=ABOUT[kind]), gr.Textbox(visible=kind == PASTED)

    def _on_build(self, kind: str, topic: str, texts: str, names: list[str], request: gr.Request) -> Iterator[Any]:
        progress = self._work[request.session_hash or ""] = Progress()
        kept = [gr.skip()] * (SLOTS + 2)
        try:
            if self._builder is None:
                raise SteerMoEError("no topics can be added here")
            is_pasted = kind == PASTED
            builder = self._builder
            build = builder.pasted(topic, texts, progress) if is_pasted else builder.described(topic, progress)
            future = self._live.call(build)
            for line in watched(future, progress):
                yield [f'<p class="sm-busy">{html.escape(line)}</p>', *kept]
            name = future.result()
        except SteerMoEError as error:
            yield [f'<p class="sm-error">{html.escape(str(error))}</p>', *kept]
            return
        finally:
            progress.is_stopped = True
            self._work.pop(request.session_hash or "", None)
        topics = [*names, *([] if name in names else [name])][-SLOTS:]
        amounts = [float(one == name) for one in topics] + [0.0] * (SLOTS - len(topics))
        done = f"<p>Done: <b>{html.escape(name)}</b> has a slider now, turned up. Press Write.</p>"
        yield [done, topics, gr.Dropdown(choices=topics, value=name), *self._sliders(amounts, topics)]

    def _on_halt(self, request: gr.Request) -> None:
        if progress := self._work.get(request.session_hash or ""):
            progress.is_stopped = True

    def _on_map(self, name: str | None) -> str:
        from steermoe.vectors.picture import draw_vector

        if not name:
            return ""
        try:
            plan = self._resolver.plan(Settings(" x", amounts={name: 1.0}).spec(lambda one: 1.0))
            assert plan is not None
            assert plan.vector is not None
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "map.png"
                draw_vector(plan.vector, path)
                return view.vector_map(path.read_bytes(), name)
        except SteerMoEError as error:
            return f'<p class="sm-error">{html.escape(str(error))}</p>'

    # ---- sharing ----

    def _wire_exports(self) -> None:
        w = self._w
        outputs = [w["command"], w["python"], w["curl"], w["query"]]
        changes = [widget.change for widget in (*w.settings.values(), *w.amounts)]
        shown = gr.on(
            changes, self._on_exports, w.controls, outputs, queue=False, trigger_mode="always_last", **QUIETLY
        )
        shown.then(None, w["query"], w["link"], js=TO_LINK, show_progress="hidden")
        saved = w["save"].click(self._on_save, None, w["page"], **QUIETLY)
        saved.then(None, w["page"], None, js=TO_FILE, show_progress="hidden")

    def _on_exports(self, data: dict[Any, Any], request: gr.Request) -> list[str]:
        session = self.sessions.of(request.session_hash or "")
        try:
            settings = self._settings(data)
            spec = session.spec(settings)
        except SteerMoEError as error:
            return [f"# {error}"] * 3 + [""]
        address = str(request.request.base_url).rstrip("/") if request.request is not None else exports.ADDRESS
        return [
            exports.command(settings, spec, self._model),
            exports.python(settings, spec, self._model),
            exports.curl(settings, spec, self._name, address),
            settings.query(),
        ]

    def _on_save(self, request: gr.Request) -> str:
        """The two texts as a page of their own, as `--trace` writes it."""
        session = self.sessions.of(request.session_hash or "")
        run = session.run
        completions = [] if run is None else [text.completion for text in run.texts]
        traced = [one for one in completions if one is not None and one.trace is not None and len(one.trace)]
        if run is not None and not run.request.trace:
            raise gr.Error(f"Nothing to save: {self._live.untraced}", print_exception=False)
        if run is None or not traced:
            raise gr.Error("There is no text yet: press Write, and let it finish.", print_exception=False)
        again = run.again
        if again is not None:
            return trace_page(traced, self._name, exports.command(again, session.spec(again), self._model))
        return trace_page(traced, self._name, note=CHANGED if run.is_changed else CONTINUED)


ORDER = tuple(name for name in Settings.__dataclass_fields__ if name != "amounts")
"""The fields of settings that have a widget each."""
