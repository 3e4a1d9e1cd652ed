"""A page of traces in a real browser: keys and pointer, dark and small, without a message or a request."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from steermoe.tracing.page import page
from tests.tracing.test_page import EVIL, completion_of, plan_named, trace_of

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or ""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="there is no chromium on the path"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path: Path):
    """A function that opens a page; at the end, nothing may have been reported or requested."""
    seen: list[str] = []
    contexts = []

    def open_page(text: str, **options):
        (tmp_path / "t.html").write_text(text, encoding="utf-8")
        context = browser.new_context(**options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: seen.append(message.text))
        tab.on("pageerror", lambda error: seen.append(str(error)))
        tab.on("dialog", lambda dialog: seen.append("a dialog"))
        tab.on("request", lambda request: None if request.url.endswith("t.html") else seen.append(request.url))
        tab.goto((tmp_path / "t.html").as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert seen == []


def example(words, **sizes):
    trace = trace_of(words, **sizes)
    return trace, page([completion_of(trace, "A dog.", plan_named("sport"))], "a-model", "steermoe generate")


def test_keys_pointer_and_colours(opened):
    trace, text = example([f"word{number} " for number in range(40)])
    tab = opened(text)
    on = tab.locator(".smt-on")
    assert on.inner_text() == "word0 "
    on.focus()
    for key, expected in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 39), ("Home", 0)):
        tab.keyboard.press(key)
        assert on.inner_text() == f"word{expected} "
    tab.keyboard.press("ArrowDown")
    below = tab.evaluate("document.querySelector('steermoe-trace').at")
    assert below > 3
    tab.keyboard.press("ArrowUp")
    assert on.inner_text() == "word0 "
    tab.locator(".smt-token").nth(5).hover()
    assert on.inner_text() == "word5 "
    shown = tab.locator(".smt-shares span").nth(1).inner_text()
    assert shown == f"{round(100 * trace.share_before[5, 0])}% \u2192 {round(100 * trace.share[5, 0])}%"
    tab.locator(".smt-token").nth(6).click()
    tab.locator(".smt-token").nth(9).hover()
    assert on.inner_text() == "word6 "
    tab.keyboard.press("Escape")
    tab.locator(".smt-token").nth(8).hover()
    assert on.inner_text() == "word8 "
    colour = "getComputedStyle(document.querySelectorAll('.smt-token')[6]).backgroundColor"
    before = tab.evaluate(colour)
    tab.get_by_role("button", name="moved by steering").click()
    assert tab.evaluate(colour) != before
    tab.locator(".smt-token").nth(39).click()
    assert "did not read this token" in tab.locator(".smt-say").inner_text()


def test_the_grid_says_what_each_cell_is(opened):
    trace, text = example(["a ", "b ", "c "])
    tab = opened(text)
    cell = tab.evaluate("document.querySelector('steermoe-trace').cell")
    said = {}
    for layer in range(3):
        for expert in range(8):
            at = {"x": cell["left"] + (expert + 0.5) * cell["wide"], "y": (layer + 0.5) * cell["high"]}
            tab.locator(".smt-panel canvas").first.hover(position=at)
            said[layer, expert] = tab.locator(".smt-say").inner_text()
    for (layer, expert), words in said.items():
        now, before = (expert in each[0, layer] for each in (trace.chosen, trace.unsteered))
        expected = {
            (True, True): "chosen, with steering or without",
            (True, False): "chosen because of steering",
            (False, True): "left out because of steering",
            (False, False): "not chosen",
        }[now, before]
        whose = "; an expert of sport" if trace.domains[0].experts[layer, expert] else ""
        assert words == f"layer {layer}, expert {expert}: {expected}{whose}"
    assert np.unique(list(said.values())).size == 24


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(opened, scheme):
    _, text = example([" some words"] * 60, layers=48, experts=128, top_k=8)
    tab = opened(text, viewport={"width": 390, "height": 800}, color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    letters, ground = tab.evaluate("['color', 'backgroundColor'].map((name) => getComputedStyle(document.body)[name])")
    brightness = [sum(map(int, value[4:-1].split(","))) for value in (letters, ground)]
    assert (brightness[0] > brightness[1]) == (scheme == "dark")


def test_nothing_that_comes_from_outside_runs(opened):
    trace = trace_of(["a", EVIL, "x"], domains=(EVIL,))
    tab = opened(page([completion_of(trace, EVIL, plan_named(EVIL, title=EVIL, keywords=(EVIL,)))], EVIL, EVIL, EVIL))
    assert tab.locator(".smt-token").nth(1).inner_text().startswith("</script><script>alert(1)")
    assert tab.locator("img").count() == 0
