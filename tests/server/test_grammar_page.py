"""The page's control for grammars, in a browser: what is written there reaches the engine; mistakes are told there."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from model.grammar import Grammar
from tests.server.live import LiveServer
from tests.server.page_browser import PageEngine, launch, visit


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launch() as browser:
        yield browser


@pytest.fixture
def engine() -> PageEngine:
    return PageEngine()


@pytest.fixture
def page(browser: Browser, engine: PageEngine) -> Iterator[Page]:
    with LiveServer(engine) as server, visit(browser, server.url) as page:
        page.get_by_text("What it may be").click()
        yield page


def generate(page: Page, kind: str, text: str) -> None:
    page.locator("#prompt").fill("p")
    page.locator("#grammar_type").select_option(kind)
    page.locator("#grammar").fill(text)
    page.locator("#generate").click()


@pytest.mark.parametrize(
    ("kind", "text", "grammar"),
    [
        ("regex", "a+ ", Grammar.regex("a+ ")), ("choice", "yes\nno\n", Grammar.choice(["yes", "no"])),
        ("json_schema", '{"type": "boolean"}', Grammar.json_schema({"type": "boolean"})),
        ("lark", 'start: "a"\n', Grammar.lark('start: "a"\n')),
    ],
)  # fmt: skip
def test_a_grammar_reaches_the_engine(page: Page, engine: PageEngine, kind: str, text: str, grammar: Grammar) -> None:
    generate(page, kind, text)
    expect(page.locator(".choice-heading")).to_be_attached()
    expect(page.locator("#generate")).to_be_enabled()
    assert [stream.params.grammar for stream in engine.submitted] == [grammar]


def test_mistakes_are_told_at_the_control(page: Page, engine: PageEngine) -> None:
    for kind, text, told in (
        ("json_schema", "{", "Write the schema as JSON"), ("json_schema", json.dumps([1]), "an object in braces"),
        ("regex", "(", "regular expression"),
    ):  # fmt: skip
        generate(page, kind, text)
        expect(page.locator("#grammar")).to_have_attribute("aria-invalid", "true")
        expect(page.locator(".field", has=page.locator("#grammar"))).to_contain_text(told)
    assert engine.submitted == []
