"""The page's widgets and where they stand. Their labels are for people who have never heard of experts or routers."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from steermoe.formulas import FORMULAS, SCALES
from steermoe.routing.positions import POSITIONS
from steermoe.serving.page import view
from steermoe.serving.page.settings import MOST_AMOUNT, MOST_TOKENS, OWN, Settings

SLOTS = 24
"""Sliders for topics; those beyond the model's topics are hidden until one is built."""
STORY, CHAT = "Continue a story", "Answer a message"
DESCRIBED, PASTED = "Describe it in a few words", "Paste texts about it"

ABOUT = {
    DESCRIBED: "The model writes texts about it, which show which of its experts to turn up. This takes minutes.",
    PASTED: "What its slider is called. The texts show which of the model's experts to turn up.",
}
NO_TOPICS = "This model has no topics yet: add one at the bottom of this page, such as sport."

ON_TOKEN = """
element.addEventListener("steermoe-token", (event) => {
  event.target.classList.add("sm-open");
  trigger("token", { number: event.detail.number });
});
"""
"""A token that is clicked opens the view of its experts; the server is notified."""


def tokens(value: str, elem_id: str) -> Any:
    """A text whose tokens can be clicked.

    Not a class of its own: Gradio would write a file of types beside this one.
    """
    made: Any = gr.HTML(value, js_on_load=ON_TOKEN, apply_default_css=False, elem_id=elem_id)
    made.postprocess = lambda text: text  # without a warning that the JSON of a trace, in a <script>, will not run
    return made


@dataclass
class Widgets:
    """All that the page's functions read or change.

    Attributes:
        names: the topics, one for each slider that is shown.
        picked: side and number of the token that was clicked last, or None.
        settings: one for each field of `Settings` but the amounts, in their order.
    """

    names: gr.State
    picked: gr.State
    settings: dict[str, Any] = field(default_factory=dict)
    amounts: list[gr.Slider] = field(default_factory=list)
    sides: list[Any] = field(default_factory=list)
    presets: dict[str, gr.Button] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)

    @property
    def controls(self) -> set[Any]:
        """Everything that settings are read from."""
        return {self.names, self.picked, *self.settings.values(), *self.amounts}

    def __getitem__(self, name: str) -> Any:
        return self.settings[name] if name in self.settings else self.others[name]


def make(
    first: Settings, topics: Sequence[str], presets: Sequence[str], model: str, can_chat: bool, can_build: bool
) -> Widgets:
    """Lay the page out, inside `gr.Blocks`."""
    widgets = Widgets(gr.State(list(topics)), gr.State(None))
    gr.HTML(
        "<h1>Steer a language model while it writes</h1>"
        "<p>Inside this model, small <b>experts</b> take turns. Turn up the experts for a topic, press <b>Write</b>, "
        "and move a slider while it is writing.</p>",
        elem_classes="sm-title",
    )
    if not topics:
        gr.HTML(f"<p>{html.escape(NO_TOPICS)}</p>", elem_classes="sm-hint")
    _prompt(widgets, first, can_chat)
    if presets:
        with gr.Row(elem_classes="sm-presets"):
            gr.HTML("Try:", elem_classes="sm-try")
            widgets.presets = {name: gr.Button(name, size="sm", min_width=60) for name in presets}
    _sliders(widgets, first, topics)
    widgets.others["branch"] = gr.Button("Write on from here", variant="primary", visible=False, elem_id="sm-branch")
    with gr.Row(elem_classes="sm-sides", equal_height=False):
        for side, name in enumerate(("unsteered", "steered")):
            with gr.Column(min_width=300):
                widgets.sides.append(tokens(view.empty(side), f"sm-{name}"))
    _more(widgets, first)
    _build(widgets, can_build)
    _map(widgets, topics)
    _share(widgets)
    gr.HTML(
        f"<p>Model: {html.escape(model)}. Colours show how much of a word's work the topic's experts did.</p>",
        elem_classes="sm-foot",
    )
    return widgets


def _prompt(widgets: Widgets, first: Settings, can_chat: bool) -> None:
    with gr.Row(elem_classes="sm-ask"):
        with gr.Column(scale=5, min_width=260):
            widgets.settings["prompt"] = gr.Textbox(
                first.prompt, label="How the text begins", lines=2, max_lines=8, elem_id="sm-prompt"
            )
        with gr.Column(scale=1, min_width=150):
            widgets.others["write"] = gr.Button("Write", variant="primary", elem_id="sm-write")
            widgets.others["stop"] = gr.Button("Stop", elem_id="sm-stop")
    widgets.settings["is_chat"] = gr.Radio(
        [STORY, CHAT], value=STORY, show_label=False, container=False, visible=can_chat, elem_id="sm-mode"
    )


def _sliders(widgets: Widgets, first: Settings, topics: Sequence[str]) -> None:
    with gr.Row(elem_classes="sm-topics"):
        for number in range(SLOTS):
            name = topics[number] if number < len(topics) else ""
            widgets.amounts.append(
                gr.Slider(
                    0,
                    1,
                    value=first.amounts.get(name, 0),
                    step=0.05,
                    label=name or "topic",
                    visible=bool(name),
                    min_width=150,
                    buttons=[],
                    elem_id=f"sm-topic-{number}",
                )
            )
    widgets.settings["strength"] = gr.Slider(
        -MOST_AMOUNT,
        MOST_AMOUNT,
        value=first.strength,
        step=0.05,
        label="How strongly",
        info="1 is as much as the language bears well. Below 0 leads away from the topics.",
        elem_id="sm-strength",
        buttons=["reset"],
    )


def _more(widgets: Widgets, first: Settings) -> None:
    with gr.Accordion("More settings", open=False, elem_id="sm-more"):
        with gr.Row():
            widgets.settings["formula"] = gr.Dropdown(
                [OWN, *FORMULAS], value=OWN, label="Formula", info="How an expert's score is changed."
            )
            widgets.settings["scale"] = gr.Dropdown(
                [OWN, *SCALES], value=OWN, label="Scale", info="Of the max-scaled formulas: |max z| or max z."
            )
            widgets.settings["positions"] = gr.Dropdown(
                list(POSITIONS), value=first.positions, label="Which words", info="The words that are steered."
            )
        with gr.Row():
            widgets.settings["schedule"] = gr.Textbox(
                first.schedule,
                label="When",
                info="constant, first:N, after:N, decay:N or window:A-B, counted in words.",
                elem_id="sm-schedule",
            )
            widgets.settings["layers"] = gr.Textbox(
                first.layers, label="Which layers", info="Such as 10-20; empty for all.", elem_id="sm-layers"
            )
        with gr.Row():
            widgets.settings["tokens"] = gr.Slider(
                1, MOST_TOKENS, value=first.tokens, step=1, label="Length at most, in words", elem_id="sm-tokens"
            )
            widgets.settings["temperature"] = gr.Slider(
                0, 2, value=first.temperature, step=0.05, label="Daring (0 = always the likeliest word)"
            )
            widgets.settings["min_p"] = gr.Slider(
                0,
                1,
                value=first.min_p,
                step=0.01,
                label="Leave out unlikely words",
                info="Those with less than this share of the likeliest word's probability (min-p).",
                elem_id="sm-min-p",
            )
            widgets.settings["seed"] = gr.Number(
                first.seed, label="Seed", info="The same seed gives the same text.", precision=0, minimum=0
            )


def _build(widgets: Widgets, can_build: bool) -> None:
    others = widgets.others
    with gr.Accordion("Add a topic of your own", open=False, visible=can_build, elem_id="sm-add"):
        others["kind"] = gr.Radio([DESCRIBED, PASTED], value=DESCRIBED, show_label=False, container=False)
        others["topic"] = gr.Textbox(
            label="Topic",
            placeholder="pirates at sea",
            info=ABOUT[DESCRIBED],
            elem_id="sm-topic-words",
        )
        others["texts"] = gr.Textbox(
            label="Texts",
            info="At least 4, better 30, with an empty line after each.",
            lines=6,
            max_lines=14,
            visible=False,
            elem_id="sm-texts",
        )
        with gr.Row():
            others["build"] = gr.Button("Add it", variant="primary", size="sm", elem_id="sm-build")
            others["halt"] = gr.Button("Stop", size="sm", elem_id="sm-halt")
        others["progress"] = gr.HTML("", elem_id="sm-progress")


def _map(widgets: Widgets, topics: Sequence[str]) -> None:
    with gr.Accordion("Where a topic's experts are", open=False, elem_id="sm-maps"):
        widgets.others["mapped"] = gr.Dropdown(
            list(topics), value=None, label="Topic", info="Layers from top to bottom, experts from left to right."
        )
        widgets.others["map"] = gr.HTML("")


def _share(widgets: Widgets) -> None:
    others = widgets.others
    with gr.Accordion("Share and export", open=False, elem_id="sm-share"):
        with gr.Row():
            others["link"] = gr.Textbox(
                label="Link to these settings", interactive=False, buttons=["copy"], elem_id="sm-link", scale=4
            )
            others["save"] = gr.Button("Save the texts as a page", size="sm", elem_id="sm-save", scale=1)
        others["query"] = gr.Textbox(visible="hidden")
        others["page"] = gr.Textbox(visible="hidden")
        with gr.Tabs():
            for name, words, language in (
                ("command", "Command", "shell"),
                ("python", "Python", "python"),
                ("curl", "curl", "shell"),
            ):
                with gr.Tab(words):
                    others[name] = gr.Code("", language=language, show_label=False, lines=3, elem_id=f"sm-{name}")
