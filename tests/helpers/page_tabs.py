"""A browser, and what people do in a tab of it with the web page."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator

from playwright.sync_api import Locator, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip

TIMEOUT = 30_000  # milliseconds for the page to get anywhere, on a busy machine


@contextlib.contextmanager
def running_browser() -> Iterator:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS])
        expect.set_options(timeout=TIMEOUT)
        yield browser
        browser.close()


def box(tab: Page) -> Locator:
    """Where messages are typed."""
    return tab.get_by_placeholder("Your message")


def send(tab: Page, text: str) -> None:
    expect(box(tab)).to_be_enabled()
    box(tab).fill(text)
    box(tab).press("Enter")


def ask(tab: Page, text: str) -> None:
    """Send a message, and wait until the answer is complete."""
    before = measured(tab).count()
    send(tab, text)
    expect(measured(tab)).to_have_count(before + 1)
    expect(box(tab)).to_be_enabled()


def settle(tab: Page) -> None:
    """Wait until the page is drawn: a click on what is being drawn again is lost."""
    expect(tab.get_by_test_id("stApp")).to_have_attribute("data-test-script-state", "notRunning")


def measured(tab: Page) -> Locator:
    """What is said below each complete answer."""
    return tab.get_by_text("first text after")


def said(tab: Page) -> list[str]:
    """The text of each message."""
    texts = [message.get_by_test_id("stText").all_inner_texts() for message in messages(tab).all()]
    return ["\n".join(parts) for parts in texts]


def expect_said(tab: Page, *texts: str) -> None:
    """Wait until these are the texts of all messages."""
    until = time.monotonic() + TIMEOUT / 1000
    while said(tab) != [*texts]:
        assert time.monotonic() < until, said(tab)
        tab.wait_for_timeout(50)


def messages(tab: Page) -> Locator:
    return tab.get_by_test_id("stChatMessage")


def press(tab: Page, name: str) -> None:
    tab.get_by_role("button", name=name, exact=True).click()
