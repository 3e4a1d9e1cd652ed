"""Pictures of the page for the docs: the default model, steered toward sport and then, while it writes, toward space.

    python -m recipes.page_pictures

Needs playwright and a Chromium (`CHROMIUM`, or one on the PATH).
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
SIZES = {"play": (1280, 1270, "light"), "play_dark": (1280, 1270, "dark"), "play_phone": (390, 844, "light")}
QUERY = "?topic=sport%3D1&tokens=100"
CHANGE_AT = 40
"""Tokens after which the sliders move."""
CLICKED = 53


def slide(page: Any, topic: str, amount: float) -> None:
    slider = page.locator(".sm-topics .block", has_text=topic).locator("input[type=range]")
    slider.evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input', { bubbles: true })); }",
        amount,
    )


def draw(browser: Any, address: str, name: str) -> None:
    """Write one picture."""
    width, height, scheme = SIZES[name]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=1.25)
    page.goto(f"{address}/{QUERY}")
    page.wait_for_selector("#sm-write")
    page.wait_for_timeout(3000)  # until the settings of the link are shown
    page.click("#sm-write")
    page.wait_for_function(f"document.querySelectorAll('#sm-steered .smt-token').length > {CHANGE_AT}")
    slide(page, "space", 1)
    slide(page, "sport", 0)
    for side in ("unsteered", "steered"):
        page.wait_for_selector(f"#sm-{side} steermoe-trace", timeout=120_000)
    page.locator("#sm-steered .smt-token").nth(CLICKED).click()
    page.wait_for_selector("#sm-branch")
    page.wait_for_timeout(500)
    page.screenshot(path=DOCS / f"{name}.png")
    print(DOCS / f"{name}.png")
    page.close()


def main() -> None:
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    command = [sys.executable, "-m", "steermoe", "play", "--no-browser", "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        address = next(found[0] for line in server.stderr if (found := re.search(r"http://\S+(?=;)", line)))
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            for name in sys.argv[1:] or SIZES:
                draw(browser, address, name)
            browser.close()
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    main()
