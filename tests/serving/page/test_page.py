"""The page in a real browser: what a visitor does, and what the server did about it.

Needs Gradio, playwright and a Chromium (`CHROMIUM`, or one on the PATH); without them the tests are skipped.
"""

import os
import re
import shutil
import time
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import httpx
import pytest

pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'steermoe[play]'")
pytest.importorskip("playwright", reason="playwright is not installed: pip install playwright")

from playwright import sync_api as playwright

from steermoe.discovery.writing import Writing
from steermoe.engines.hf.rolling import RollingDecoder
from steermoe.engines.listening import ServerOptions
from steermoe.evaluation.new_topics import NewTopics
from steermoe.serving import app as serving
from steermoe.serving.page.mounting import mount
from steermoe.serving.page.settings import Settings
from tests.support import served

BROWSER = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.page,
    pytest.mark.skipif(BROWSER is None, reason="there is no chromium: install one, or name it in $CHROMIUM"),
    pytest.mark.filterwarnings("ignore"),  # Gradio's and the browser's own
]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
GREEDY = Settings("Milo", amounts={"sport": 1.0}, tokens=40, temperature=0.0)
LONG = Settings("Milo", amounts={"sport": 1.0}, tokens=1000, temperature=0.0)


@pytest.fixture(scope="module")
def site(engine, vectors):
    """A server with the page; `pages` holds its `Page`."""
    pages = []
    topics = NewTopics(engine.loaded, Writing(texts=6, new_tokens=24))
    with served.running(engine, vectors, extend=lambda app: pages.append(mount(app, topics=topics))) as running:
        running.page = pages[0]
        yield running


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield opened
        opened.close()


class Visit:
    """A visitor's tab: what it asked for, and what its console said."""

    def __init__(self, context, site):
        self.site, self.page = site, context.new_page()
        self.page.set_default_timeout(20_000)
        self.requests, self.complaints = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on(
            "console", lambda said: self.complaints.append(said.text) if said.type in ("error", "warning") else None
        )

    def open(self, settings, extra=""):
        self.others = set(self.site.page.sessions._known)
        self.page.goto(f"{self.site.url}/?{settings.query()}{extra}")
        self.page.wait_for_selector("#sm-write")
        playwright.expect(self.page.locator("#sm-prompt textarea")).to_have_value(settings.prompt)

    @property
    def run(self):
        """The two texts of this tab, the only one since it was opened; None before there are any."""
        sessions = [one for name, one in self.site.page.sessions._known.copy().items() if name not in self.others]
        return sessions[0].run if sessions else None

    def write(self):
        self.page.click("#sm-write")

    def finish(self):
        for side in ("#sm-unsteered", "#sm-steered"):
            self.page.wait_for_selector(f"{side} steermoe-trace .smt-token")

    def slide(self, topic, amount):
        number = self.site.page.topics().index(topic)
        self.set(f"#sm-topic-{number}", amount)

    def set(self, where, value):
        self.page.locator(f"{where} input[type=range]").evaluate(
            "(slider, value) => { slider.value = value;"
            " for (const name of ['input', 'change']) slider.dispatchEvent(new Event(name, { bubbles: true })); }",
            value,
        )

    def tokens(self, side):
        return self.page.locator(f"#sm-{side} .smt-token")


@pytest.fixture
def visit(browser, site):
    """A tab at a desk; afterwards, nothing was asked of another host and the console is silent."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    visit = Visit(context, site)
    yield visit
    hosts = {urlsplit(url).netloc for url in visit.requests if urlsplit(url).scheme not in ("data", "blob")}
    context.close()
    assert hosts == {urlsplit(site.url).netloc}
    assert not visit.complaints


def wait_until(is_true):
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_texts_are_written_side_by_side(visit):
    visit.open(GREEDY)
    visit.write()
    visit.finish()
    for side, name in enumerate(("unsteered", "steered")):
        assert visit.tokens(name).count() == 40
        shown = visit.page.locator(f"#sm-{name} .smt-text").inner_text()
        wanted = "Milo" + visit.run.texts[side].completion.text
        assert re.sub(r"\s", "", shown) == re.sub(r"\s", "", wanted)
    assert visit.run.texts[1].ticket.request.plan.as_dict()["domain"] == "sport"


@pytest.fixture
def unhurried(monkeypatch):
    """Texts of 1,000 tokens last at least 30 seconds, however slow the browser beside them is."""
    step = RollingDecoder.step
    monkeypatch.setattr(RollingDecoder, "step", lambda decoder: (time.sleep(0.03), step(decoder))[1])


def test_a_slider_steers_the_text_that_is_being_written(visit, unhurried):
    visit.open(LONG)
    visit.write()
    wait_until(lambda: visit.run is not None and len(visit.run.texts[1].seen) > 5)
    visit.slide("food", 0.5)
    visit.slide("sport", 0)
    visit.set("#sm-strength", -2)
    ticket = visit.run.texts[1].ticket
    wait_until(lambda: ticket.plan.strength == -16.0)
    assert not ticket.is_done
    assert ticket.plan.vector.domain == "food"
    seen = len(visit.run.texts[1].seen)
    wait_until(lambda: len(visit.run.texts[1].seen) > seen + 5)
    visit.page.click("#sm-stop")
    visit.finish()
    trace = visit.run.texts[1].completion.trace
    assert 5 < len(trace) < 1000
    assert (trace.strength[0], trace.strength[len(trace) - 3]) == (8.0, -16.0)
    assert not visit.run.texts[0].completion.trace.strength.any()


def test_a_token_shows_its_experts_and_the_text_goes_on_from_it(visit):
    visit.open(GREEDY)
    visit.write()
    visit.finish()
    panel = visit.page.locator("#sm-steered .smt-panel")
    playwright.expect(panel).to_be_hidden()
    before = visit.run
    visit.tokens("steered").nth(7).click()
    playwright.expect(panel).to_be_visible()
    playwright.expect(panel.locator(".smt-say")).to_contain_text("steering filled")
    assert "token 8 of 40" in panel.inner_text()
    branch = visit.page.locator("#sm-branch")
    playwright.expect(branch).to_contain_text("Write on after")
    branch.click()
    wait_until(lambda: visit.run is not before and visit.run.is_done)
    assert visit.run.prompt == before.prompt + before.trace(1).token_ids[:8].tolist()
    playwright.expect(branch).to_be_hidden()


def test_settings_are_exported_and_shared(visit, browser):
    visit.open(GREEDY)
    visit.page.click("#sm-share > button")
    command = visit.page.locator("#sm-command .cm-content")
    visit.set("#sm-strength", 0.5)
    playwright.expect(command).to_contain_text("--strength 4")
    link = visit.page.locator("#sm-link textarea, #sm-link input").first
    wanted = f"{visit.site.url}/?" + urlencode(
        [("prompt", "Milo"), ("strength", 0.5), ("tokens", 40), ("temperature", 0), ("topic", "sport=1")]
    )
    playwright.expect(link).to_have_value(wanted)
    visit.page.get_by_role("tab", name="curl").click()
    curl = visit.page.locator("#sm-curl .cm-content")
    playwright.expect(curl).to_contain_text(f"{visit.site.url}/v1/completions")
    visit.write()
    visit.finish()
    with visit.page.expect_download() as saved:
        visit.page.click("#sm-save")
    page = Path(saved.value.path()).read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert page.count("<steermoe-trace data-colour") == 2
    assert "steermoe compare" in page


def test_a_topic_in_words_gets_a_slider(visit):
    visit.open(GREEDY)
    visit.page.click("#sm-add > button")
    visit.page.fill("#sm-topic-words textarea, #sm-topic-words input", "pirates on land")
    visit.page.click("#sm-build")
    progress = visit.page.locator("#sm-progress")
    playwright.expect(progress).to_contain_text("Done: pirates-on-land has a slider now")
    playwright.expect(visit.page.locator(".sm-topics")).to_contain_text("pirates-on-land")
    visit.write()
    wait_until(lambda: visit.run is not None and visit.run.is_done)
    assert visit.run.texts[1].ticket.request.plan.vector.domain == "pirates-on-land"


def test_the_map_of_a_topic_is_drawn(visit):
    pytest.importorskip("matplotlib")
    visit.open(GREEDY)
    visit.page.click("#sm-maps > button")
    visit.page.locator("#sm-maps input").first.click()
    visit.page.get_by_role("option", name="sport").click()
    picture = visit.page.locator("img.sm-map")
    playwright.expect(picture).to_be_visible()
    assert picture.evaluate("image => image.naturalWidth") > 400


def test_a_preset_writes_at_once(visit):
    visit.open(GREEDY)
    visit.page.get_by_role("button", name="Anything but sport").click()
    wait_until(lambda: visit.run is not None and visit.run.settings.strength == -1)
    assert visit.run.texts[1].ticket.plan.strength == -8.0
    visit.page.click("#sm-stop")
    visit.finish()


def test_what_is_wrong_is_said_and_nothing_is_written(visit):
    visit.open(GREEDY, extra="&topic=<i>'chess'</i>=1")
    playwright.expect(visit.page.get_by_text("this model has no topic <i>'chess'</i>: add it below")).to_be_visible()
    visit.page.fill("#sm-prompt textarea", " ")
    visit.write()
    playwright.expect(visit.page.get_by_text("the prompt has 1 characters")).to_be_visible()


def test_on_a_phone_nothing_is_cut_off(browser, site):
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark", has_touch=True)
    visit = Visit(context, site)
    visit.open(GREEDY)
    visit.write()
    visit.finish()
    visit.tokens("steered").nth(3).tap()
    playwright.expect(visit.page.locator("#sm-steered .smt-panel")).to_be_visible()
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
    right = visit.page.evaluate(
        "Math.max(...[...document.querySelectorAll('#sm-steered *, .sm-topics input, button')]"
        ".filter(one => one.checkVisibility()).map(one => one.getBoundingClientRect().right))"
    )
    assert right <= 391
    context.close()
    assert not visit.complaints


def test_a_tab_that_closes_ends_its_text(browser, site, unhurried):
    context = browser.new_context()
    visit = Visit(context, site)
    visit.open(LONG)
    visit.write()
    wait_until(lambda: visit.run is not None and visit.run.texts[1].seen)
    run = visit.run
    context.close()
    wait_until(lambda: run.is_done)


def test_the_page_is_shut_with_the_key_of_the_server(browser, checkpoint, vectors, site):
    settings = serving.Settings(ServerOptions(port=0, api_keys=("secret",)), grace=1)
    engine = served.tiny_engine(checkpoint)
    with served.running(engine, vectors, settings=settings, extend=mount) as shut:
        for path in ("/", "/config", "/gradio_api/info", "/static/js/iframeResizer.contentWindow.min.js"):
            answer = httpx.get(shut.url + path)
            assert (answer.status_code, "Basic" in answer.headers["www-authenticate"]) == (401, True), path
            assert httpx.get(shut.url + path, auth=("me", "wrong")).status_code == 401
        assert httpx.get(shut.url + "/v1/models").headers["www-authenticate"] == "Bearer"
        context = browser.new_context(http_credentials={"username": "me", "password": "secret"})
        shut.page = site.page
        visit = Visit(context, shut)
        visit.open(GREEDY)
        visit.write()
        visit.finish()
        context.close()


def test_the_api_answers_beside_the_page_as_without_it(site):
    for method, path, status in (
        ("GET", "/v1/completions", 405),
        ("GET", "/v1/nothing", 404),
        ("POST", "/api/nothing", 404),
    ):
        answer = httpx.request(method, site.url + path)
        assert answer.status_code == status
        assert f"there is no {method} '{path}' here" in answer.text
    assert httpx.get(site.url + "/health").json()["status"] == "ok"
    body = b"x" * (5 << 20)
    with pytest.raises(httpx.HTTPError):
        httpx.post(site.url + "/gradio_api/queue/join", content=body).raise_for_status()


@pytest.mark.parametrize("path", ["/gradio_api/file=/etc/passwd", "/gradio_api/file=pyproject.toml"])
def test_the_page_hands_out_no_files(site, path):
    assert httpx.get(site.url + path).status_code in (403, 404)


def test_the_page_takes_no_files(site):
    answer = httpx.post(site.url + "/gradio_api/upload", files={"files": ("x.txt", b"hello")})
    assert answer.status_code in (400, 413)
