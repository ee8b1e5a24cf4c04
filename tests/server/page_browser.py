"""A headless Chromium that visits the page, and a fake engine whose tokens have probabilities of their own."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect, sync_playwright

from server.engine.messages import SequenceOutput, TokenLogprobs
from tests.server.fake_engine import FakeEngine, FakeStream, Plan

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 10_000  # milliseconds, on machines that may be busy
# The probability of a token is that of its id modulo 7, the darkest shade last.
PROBABILITIES = (0.95, 0.8, 0.6, 0.4, 0.2, 0.1, 0.01)
# Chromium logs every refused request; what the page makes of a refusal is for the tests to say.
REFUSED = "Failed to load resource"


class PageEngine(FakeEngine):
    """A FakeEngine whose log-probabilities differ from token to token; alternatives follow the id."""

    def _output(
        self, stream: FakeStream, tokens: list[int], plan: Plan, arrival: float, *, first: bool, last: bool
    ) -> SequenceOutput:
        output = super()._output(stream, tokens, plan, arrival, first=first, last=last)
        if output.logprobs is None:
            return output
        return msgspec.structs.replace(
            output, logprobs=[_entry(token, stream.params.logprobs or 0) for token in tokens]
        )


def logprob(token: int) -> float:
    return math.log(PROBABILITIES[token % 7])


def _entry(token: int, wanted: int) -> TokenLogprobs:
    near = [(token + step) % 256 for step in range(wanted)]
    return TokenLogprobs(token, logprob(token), [(other, logprob(other)) for other in near])


@contextlib.contextmanager
def launch() -> Iterator[Browser]:
    """Debian's Chromium, or whichever is on the path; skips the test where there is none."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser on the path (one of {', '.join(NAMES)}): the page cannot be visited")
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


class Tab:
    """One tab of the browser and what went wrong in it: code that threw or complained, a policy that was violated, a
    question to any other server. Its context keeps cookies and storage, by server, until the browser closes."""

    def __init__(self, browser: Browser, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(PATIENCE)
        self.page = self.context.new_page()
        self._home = ""
        self._problems: list[str] = []
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self._problems.append(str(error)))
        self.page.on("request", lambda request: self._on_request(request.url))

    @contextlib.contextmanager
    def visit(self, url: str, *, ready: bool = True) -> Iterator[Page]:
        """The page as it opens; fails at the end when anything has gone wrong."""
        self._home = url
        self.page.goto(url)
        if ready:
            expect(self.page.get_by_role("button", name="Generate")).to_be_enabled()
        yield self.page
        self.page.unroute_all(behavior="wait")
        self.page.goto("about:blank")
        problems, self._problems = self._problems, []
        assert not problems, problems

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and REFUSED not in message.text:
            self._problems.append(message.text)

    def _on_request(self, asked: str) -> None:
        if urlsplit(asked)[:2] != urlsplit(self._home)[:2]:
            self._problems.append(f"asked {asked}")


@contextlib.contextmanager
def visit(browser: Browser, url: str, *, ready: bool = True, **options: Any) -> Iterator[Page]:
    """The page in a tab and a context of its own."""
    tab = Tab(browser, **options)
    with tab.visit(url, ready=ready) as page:
        yield page
    tab.context.close()


def generate(page: Page, prompt: str | None = None) -> None:
    """Press Generate and wait for the end."""
    if prompt is not None:
        page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#texts")).to_have_attribute("aria-busy", "false")


def written(page: Page) -> str:
    """What the model wrote, without the prompt that stands in front of it."""
    return text_of(page.locator("#texts .text")).removeprefix(text_of(page.locator("#texts .prompt")))


def text_of(locator: Locator) -> str:
    return "".join(locator.all_text_contents())
