"""The page in a real browser: chat with streaming and stop, the live view, light and dark, narrow and wide, by keys."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.process import Server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.slow,
]
WORDS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
WAIT_MS = 90_000
KINDS = [("light", 1400, 900), ("dark", 1400, 900), ("light", 390, 844), ("dark", 390, 844)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=list(WORDS), timeout=WAIT_MS)
        yield started
        started.close()


def opened(browser: Any, server: Server, scheme: str = "light", width: int = 1400, height: int = 900) -> Any:
    """The page, once it shows what the server does; errors and requests to elsewhere are kept in ``faults``."""
    page = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height}).new_page()
    page.set_default_timeout(WAIT_MS)
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("console", lambda said: page.faults.append(said.text) if said.type == "error" else None)
    page.on("request", lambda asked: page.faults.append(asked.url) if not asked.url.startswith(server.url) else None)
    page.goto(server.url)
    page.wait_for_selector("#map td")
    return page


@pytest.mark.parametrize(("scheme", "width", "height"), KINDS)
def test_it_is_whole_in_every_light_and_width(browser, server, scheme, width, height):
    page = opened(browser, server, scheme, width, height)
    asked = {"prompt": ["In the beginning", "def f("], "max_tokens": 20}
    httpx.post(f"{server.url}/v1/completions", json=asked, timeout=120)
    page.wait_for_function("document.querySelector('#rows').textContent.includes('choices')")
    assert page.locator("#map td").count() == 6 * 8
    assert page.locator("#state").inner_text() == "ready"
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing is cut off at the side"
    red, green, blue = map(
        int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]
    )
    assert (red + green + blue > 380) == (scheme == "light")
    for selector in ("#question", "#send", "#map", "#ranks .rank", "#cache"):
        assert page.locator(selector).first.is_visible(), selector
    assert _contrast(page, ".quiet") >= 4.5
    assert not page.faults
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"page-{scheme}-{width}.png", full_page=True)
    page.context.close()


def test_a_chat_by_keyboard_alone(browser, server):
    page = opened(browser, server)
    page.keyboard.type("What does tar do?")  # the field has the focus from the start
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn.assistant .how")
    first = page.locator(".turn.assistant").first.inner_text()
    assert re.search(r"\w+.*\d+ tokens", first, re.S)
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"temperature", "most", "forget", "send"} <= set(reached)
    page.locator("#map td").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert page.locator("#told").inner_text().startswith("Layer 1, expert 1: ")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "where the focus is can be seen"
    page.locator("#forget").focus()
    page.keyboard.press("Enter")
    assert page.locator(".turn").count() == 0
    assert not page.faults
    page.context.close()


def test_an_answer_streams_and_stops(browser, server):
    page = opened(browser, server)
    page.locator("#most").fill("900")
    page.locator("#temperature").fill("2")
    text, how = "document.querySelector('.turn.assistant').firstChild.data", ".turn.assistant .how"
    for _ in range(10):  # what is drawn may end before it can be stopped
        page.locator("#question").fill("Tell me everything.")
        page.keyboard.press("Enter")
        page.wait_for_function(f"{text}.length > 20 || document.querySelector('{how}')")
        streamed = page.locator(how).count() == 0
        page.keyboard.press("Escape")
        page.wait_for_selector(how)
        if streamed and "stopped" in page.locator(how).inner_text():
            break
        page.locator("#forget").click()
    else:
        pytest.fail("no answer was long enough to be stopped")
    page.wait_for_function("document.querySelector('#running').textContent.startsWith('0')")
    assert not page.faults
    page.context.close()


def test_a_refusal_is_shown_and_the_question_kept(browser, server):
    page = opened(browser, server)
    page.locator("#most").fill("99999")
    page.locator("#question").fill("Too much")
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn.fault")
    assert "maximum context length is 1024 tokens" in page.locator(".turn.fault").inner_text()
    assert page.locator("#question").input_value() == "Too much"
    page.context.close()


def test_it_takes_nothing_from_elsewhere(server):
    text = httpx.get(server.url, timeout=60).text
    assert not re.findall(r"(?:src|href)=[\"'](?!data:|#)", text)
    assert not re.findall(r"https?://|@import|url\(", text)
    assert json.loads(httpx.get(f"{server.url}/live", timeout=60).text)["model"] == "ckpts"


def _contrast(page: Any, selector: str) -> float:
    """Of an element's text against its card, as WCAG counts it."""
    return page.evaluate(
        """(selector) => {
          const light = (color) => {
            const [r, g, b] = color.match(/[\\d.]+/g).map((x) => x / 255)
              .map((x) => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
            return .2126 * r + .7152 * g + .0722 * b;
          };
          const found = document.querySelector(selector), card = found.closest("section");
          const [a, b] = [getComputedStyle(found).color, getComputedStyle(card).backgroundColor].map(light)
            .sort((x, y) => y - x);
          return (a + .05) / (b + .05);
        }""",
        selector,
    )
