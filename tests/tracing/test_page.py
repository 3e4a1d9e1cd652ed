"""Pages of traces: everything escaped, nothing loaded, small enough for a mail, and what the script reads is right."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from steermoe.engines.request import Completion, Request
from steermoe.engines.trace import NO_EXPERT, Domain, Trace
from steermoe.errors import GenerationError
from steermoe.steering.plans import SteeringPlan
from steermoe.tracing.file import as_json, check_ending, write_traces
from steermoe.tracing.page import page, panes_of
from steermoe.tracing.view import fragment, script, style
from steermoe.vectors.vector import SteeringVector, VectorInfo

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&amp;'\"`<!--\u2028"
"""What could end an element, open one or run, wherever it stands."""


def trace_of(tokens, layers=3, experts=8, top_k=2, domains=("sport",), seed=0):
    """Random choices for a list of texts; the last token is not read."""
    draw = np.random.default_rng(seed)
    shape = (len(tokens), layers, experts)
    chosen, unsteered = (draw.random(shape).argsort(-1)[..., :top_k].astype(np.int32) for _ in range(2))
    chosen[-1] = unsteered[-1] = NO_EXPERT
    count = len(tokens)
    trace = Trace(
        tuple(tokens),
        np.arange(count),
        -draw.random(count).astype(np.float32),
        tuple(range(layers)),
        (experts,) * layers,
        chosen,
        unsteered,
        (),
        np.zeros((count, 0), np.float32),
        np.zeros((count, 0), np.float32),
        np.full(count, 2, np.float32),
    )
    return trace.with_domains([Domain(name, draw.random((layers, experts)) < 0.3) for name in domains])


def completion_of(trace, prompt="A dog.", plan=None):
    return Completion(
        Request(prompt, plan, trace=True), trace.text, tuple(trace.token_ids), 3, "length", 1.0, trace=trace
    )


def plan_named(name, **info):
    vector = SteeringVector(name, torch.full((3, 8), 1 / 8), (0, 1, 2), threshold=0.5, info=VectorInfo(**info))
    return SteeringPlan(vector, 2.0)


class Elements(HTMLParser):
    """The tags of a page with their attributes, and its text outside of scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._inside = [], "", ""
        self.blocks: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.blocks.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.blocks[-1] += data
        elif self._inside != "style":
            self.text += data


def test_nothing_that_comes_from_outside_becomes_markup():
    """In the prompt, the model's text, names, titles and keywords of vectors, the model's name and the command."""
    trace = trace_of(["a", EVIL, " <b>", "x"], domains=(EVIL,))
    evil = completion_of(trace, EVIL, plan_named(EVIL, title=EVIL, keywords=(EVIL,)))
    text = page([replace(evil, request=Request(EVIL, trace=True)), evil], EVIL, EVIL, EVIL)
    plain = completion_of(
        trace_of(["a", "b", "c", "x"], domains=("d",)), "p", plan_named("d", title="t", keywords=("k",))
    )
    usual = page([replace(plain, request=Request("p", trace=True)), plain], "m", "c", "e")
    found, expected = Elements(text), Elements(usual)
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in expected.tags]
    assert {name for _, attributes in found.tags for name in attributes} == {
        name for _, attributes in expected.tags for name in attributes
    }
    assert not {"img", "b"} & {tag for tag, _ in found.tags}
    assert found.text.count(EVIL.replace("\u2028", "\u2028")) >= 8
    blocks = [json.loads(block) for block in found.blocks[:2]]
    assert [block["tokens"][1] for block in blocks] == [EVIL, EVIL]
    assert blocks[0]["domains"][0]["name"] == EVIL


def test_the_page_loads_nothing_and_runs_its_own_script_alone():
    text = page([completion_of(trace_of(["a", "b"]))], "m")
    found = Elements(text)
    policy = next(each["content"] for tag, each in found.tags if each.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    (js,) = (block for block in found.blocks if "customElements" in block)
    (css,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    for part in (js, css):
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert not re.search(r"https?:|\b(src|href)=|url\(|@import|\bfetch\(|style=|\son[a-z]+=", text)


@pytest.mark.parametrize("experts", [128, 300])
def test_a_long_text_of_a_large_model_fits_into_a_mail(experts):
    trace = trace_of([" token"] * 300, layers=48, experts=experts, top_k=8, domains=("sport", "food"))
    text = page([completion_of(trace, plan=plan_named("sport"))], "a-model", "steermoe generate")
    assert len(text.encode()) < (1_500_000 if experts < 255 else 2_000_000)
    steered, unsteered = trace, replace(trace, unsteered=trace.chosen)
    if experts < 255:
        both = page([completion_of(unsteered), completion_of(steered, plan=plan_named("sport"))], "a-model")
        assert len(both.encode()) < 1_500_000


@pytest.mark.parametrize(("experts", "size"), [(254, 1), (255, 2)])
def test_what_the_script_reads_is_the_trace(experts, size):
    trace = trace_of(["a", "", "c"], experts=experts, domains=("sport", "food"))
    found = Elements(fragment(trace))
    data = json.loads(found.blocks[0])
    assert data["wide"] == (size == 2)
    for name in ("chosen", "unsteered"):
        packed = np.frombuffer(base64.b64decode(data[name]), "<u2" if size == 2 else "u1")
        np.testing.assert_array_equal(packed.astype(int).reshape(trace.chosen.shape) - 1, getattr(trace, name))
    marks = np.unpackbits(np.frombuffer(base64.b64decode(data["domains"][1]["experts"]), "u1"))
    np.testing.assert_array_equal(marks[: 3 * experts].reshape(3, experts), trace.domains[1].experts)
    spans = [each["class"].split() for tag, each in found.tags if "smt-token" in (each.get("class") or "").split()]
    assert len(spans) == 3
    domain = int(trace.share[0].argmax())
    assert f"smt-c{domain}" in spans[0]
    assert f"smt-s{round(10 * float(trace.share[0, domain]))}" in spans[0]
    assert "smt-part" in spans[1]
    assert "smt-unread" in spans[2]


def test_an_unsteered_text_needs_its_choices_once():
    trace = trace_of(["a", "b"])
    same = Elements(fragment(replace(trace, unsteered=trace.chosen)))
    assert json.loads(same.blocks[0])["unsteered"] is None
    assert "moved" not in [each.get("value") for _, each in same.tags]


def test_all_texts_of_a_page_are_coloured_by_the_same_domains():
    plain = trace_of(["a", "b"], domains=())
    steered = trace_of(["a", "b"], domains=("sport",))
    panes = panes_of([completion_of(plain), completion_of(steered, plan=plan_named("sport"))])
    assert [pane.label for pane in panes] == ["unsteered", "sport"]
    assert [[domain.name for domain in pane.trace.domains] for pane in panes] == [["sport"], ["sport"]]
    assert panes[0].trace.share[0, 0] == pytest.approx(
        steered.domains[0].experts[[[0], [1], [2]], plain.chosen[0]].mean()
    )
    with pytest.raises(ValueError, match="has no trace"):
        panes_of([replace(completion_of(plain), trace=None)])


def test_files(tmp_path):
    trace = trace_of(["a", "b"])
    write_traces(tmp_path / "x.json", [completion_of(trace)], "m", "steermoe generate", "hf")
    read = json.loads((tmp_path / "x.json").read_text())
    assert (read["model"], read["engine"], read["command"]) == ("m", "hf", "steermoe generate")
    assert read["texts"][0]["text"] == "ab"
    again = Trace.from_dict(read["texts"][0]["trace"])
    np.testing.assert_array_equal(again.chosen, trace.chosen)
    write_traces(tmp_path / "x.html", [completion_of(trace)], "m")
    assert (tmp_path / "x.html").read_text().startswith("<!doctype html>")
    for wrong, part in (("x.txt", "ends in '.txt'"), ("no/x.json", "there is no folder")):
        with pytest.raises(GenerationError, match=re.escape(part)):
            check_ending(tmp_path / wrong)
    assert json.loads(as_json([completion_of(trace)], "m"))["version"] == 1


def test_parts_for_other_pages():
    assert "customElements.define" in script()
    assert "</" not in script()
    assert "prefers-color-scheme: dark" in style()


def test_a_note_is_shown_escaped():
    one = completion_of(trace_of(["a", "b"]))
    text = page([one], "m", note="<b>moved</b>")
    assert "<p>&lt;b&gt;moved&lt;/b&gt;</p>" in text
    assert "The command" not in text
    assert text.replace("<p>&lt;b&gt;moved&lt;/b&gt;</p>", "") == page([one], "m")
