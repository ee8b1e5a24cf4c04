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
        self, stream: FakeStream, tokens: list[int], plan: Plan, arrival: float, *, last: bool
    ) -> SequenceOutput:
        output = super()._output(stream, tokens, plan, arrival, last=last)
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


@contextlib.contextmanager
def visit(browser: Browser, url: str, *, ready: bool = True, **options: Any) -> Iterator[Page]:
    """The page in a context of its own. Fails when its code throws or complains, when its policy is violated, or when
    it asks any other server for anything."""
    context = browser.new_context(**options)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    problems: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and REFUSED not in message.text:
            problems.append(message.text)

    page.on("console", note)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: _stays_home(request.url, url, problems))
    page.goto(url)
    if ready:
        expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    yield page
    context.close()
    assert not problems, problems


def _stays_home(asked: str, own: str, problems: list[str]) -> None:
    if urlsplit(asked)[:2] != urlsplit(own)[:2]:
        problems.append(f"asked {asked}")


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
