"""The page for everybody: names that assistive tools read, the keyboard, contrast, small windows, less motion."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.server.fake_engine import Plan, says
from tests.server.live import LiveServer
from tests.server.page_browser import PROBABILITIES, PageEngine, Tab, generate, launch, visit

OPERABLE = {"button", "textbox", "spinbutton", "combobox", "checkbox", "link", "slider", "searchbox",
            "DisclosureTriangle", "radio", "switch"}  # fmt: skip
# The contrast of every visible text with what lies behind it (WCAG 2.2, 1.4.3), colours resolved by a canvas.
CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const mix = (layers) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const layer of layers) { canvas.fillStyle = layer; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const worst = {};
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join(" ").trim();
    if (!text || !element.checkVisibility() || element.closest(":disabled, noscript, .unseen, .skip, option")) continue;
    const behind = [];
    for (let up = element; up; up = up.parentElement) behind.unshift(getComputedStyle(up).backgroundColor);
    const back = light(mix(behind)), front = light(mix([...behind, getComputedStyle(element).color]));
    const ratio = (Math.max(back, front) + 0.05) / (Math.min(back, front) + 0.05);
    const name = `${element.tagName} ${element.className} ${text.slice(0, 20)}`;
    worst[name] = Math.min(worst[name] ?? 99, ratio);
  }
  return worst;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launch() as browser:
        yield browser


@pytest.fixture(scope="module")
def engine() -> PageEngine:
    return PageEngine(says("First line\nsecond one"))


@pytest.fixture(scope="module")
def server(engine: PageEngine) -> Iterator[LiveServer]:
    with LiveServer(engine) as server:
        yield server


@pytest.fixture(scope="module")
def tab(browser: Browser) -> Tab:
    return Tab(browser)


@pytest.fixture
def page(tab: Tab, server: LiveServer) -> Iterator[Page]:
    with tab.visit(server.url) as page:
        yield page


def open_everything(page: Page) -> None:
    page.locator("details").evaluate_all("all => all.forEach((details) => (details.open = true))")


def accessible_nodes(page: Page) -> list[dict[str, Any]]:
    """What Chromium tells assistive tools of the page."""
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    return [node for node in nodes if not node["ignored"]]


def test_every_control_has_a_name(page: Page) -> None:
    open_everything(page)
    generate(page)
    page.locator("#key-panel").evaluate("panel => (panel.hidden = false)")
    nodes = [node for node in accessible_nodes(page) if node["role"]["value"] in OPERABLE]
    names = [(node["role"]["value"], node["name"]["value"].strip()) for node in nodes]
    assert len(names) >= 35
    assert [role for role, name in names if not name] == []
    repeated = {pair for pair in names if names.count(pair) > 1}
    assert repeated == set()


def test_regions_and_headings_tell_the_structure(page: Page) -> None:
    generate(page)
    roles = [node["role"]["value"] for node in accessible_nodes(page)]
    assert {role: roles.count(role) for role in ("main", "banner", "complementary")} == dict.fromkeys(
        ("main", "banner", "complementary"), 1
    )
    headings = page.locator("h1:visible, h2:visible, h3:visible")
    levels = headings.evaluate_all("all => all.map((each) => +each.tagName[1])")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    expect(page.locator("html")).to_have_attribute("lang", "en")
    expect(page.locator("#progress")).to_have_attribute("role", "status")
    expect(page.locator("#texts")).to_have_attribute("aria-live", "polite")


def test_the_keyboard_reaches_everything_in_order(page: Page) -> None:
    generate(page)
    open_everything(page)
    page.mouse.click(2, 2)
    active, order = "document.activeElement", []
    for _ in range(60):
        page.keyboard.press("Tab")
        id = page.evaluate(f"{active}.id || {active}.className || {active}.tagName")
        if id == "BODY":
            break
        order.append(id)
        outline = page.evaluate(f"getComputedStyle({active}).outlineStyle")
        assert outline != "none", f"the focus on {id} cannot be seen"
    wanted = ["skip", "theme", "prompt_kind", "prompt", "generate", "text", "shaded", "replay", "reset", "model",
              "temperature", "top_p", "max_tokens", "seed", "top_k", "stop-strings", "echo", "model-json"]  # fmt: skip
    assert [id for id in order if id in wanted] == wanted
    named = [id for id in order if id != "SUMMARY"]
    assert len(named) == len(set(named))


def test_control_enter_generates_from_the_prompt(page: Page, engine: PageEngine) -> None:
    before = len(engine.submitted)
    page.get_by_role("link", name="Skip to the prompt").press("Enter")
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    page.keyboard.press("Control+Enter")
    expect(page.locator("#progress")).to_contain_text("Finished")
    assert len(engine.submitted) == before + 1


def test_a_pointer_on_a_token_shows_what_else_was_likely(page: Page) -> None:
    generate(page)
    card = page.get_by_role("tooltip")
    token = page.locator(".token").first
    token.hover()
    expect(card).to_be_visible()
    expect(card.locator(".card-title strong")).to_have_text(f"{PROBABILITIES[ord('F') % 7]:.0%}".replace("%", " %"))
    expect(card.locator("li")).to_have_count(5)
    expect(card.locator("li code")).to_have_text(list("FGHIJ"))
    card.hover()  # it stays to be read
    page.wait_for_timeout(300)
    expect(card).to_be_visible()
    page.keyboard.press("Escape")
    expect(card).to_be_hidden()
    token.click()
    expect(card).to_be_visible()
    page.mouse.move(5, 5)
    expect(card).to_be_hidden()


def test_shades_follow_the_probability(page: Page) -> None:
    generate(page)
    letters = "First line\nsecond one"
    shades = page.locator(".token").evaluate_all("all => all.map((each) => /p(\\d)/.exec(each.className)[1])")
    by_probability = {0.95: "0", 0.8: "1", 0.6: "2", 0.4: "3", 0.2: "4", 0.1: "5", 0.01: "6"}
    assert shades == [by_probability[PROBABILITIES[ord(letter) % 7]] for letter in letters]
    strength = """all => all.map((each) => {
      const canvas = new OffscreenCanvas(1, 1).getContext("2d");
      canvas.fillStyle = getComputedStyle(each).backgroundColor;
      canvas.fillRect(0, 0, 1, 1);
      return canvas.getImageData(0, 0, 1, 1).data[3];
    })"""
    alphas = page.locator(".legend i").evaluate_all(strength)
    assert alphas[0] == 0
    assert alphas == sorted(set(alphas))
    page.get_by_label("Shade by probability").uncheck()
    assert set(page.locator(".token").evaluate_all(strength)) == {0}


def test_the_arrow_keys_step_through_the_tokens(page: Page) -> None:
    generate(page)
    card, status = page.get_by_role("tooltip"), page.locator("#token-status")
    text = page.get_by_role("group", name="Generated text")
    page.get_by_role("button", name="Generate").focus()
    page.keyboard.press("Tab")
    expect(text).to_be_focused()
    expect(card.locator(".card-title code")).to_have_text("F")
    page.keyboard.press("ArrowRight")
    expect(card.locator(".card-title code")).to_have_text("i")
    share = f"{PROBABILITIES[ord('i') % 7]:.0%}".replace("%", " %")
    expect(status).to_contain_text(f"i, {share}; instead: j ")
    for _ in range(9):
        page.keyboard.press("ArrowRight")
    expect(card.locator(".card-title code")).to_have_text("↵")
    page.keyboard.press("End")
    expect(card.locator(".card-title code")).to_have_text("e")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    expect(card.locator(".card-title code")).to_have_text("F")
    page.keyboard.press("Escape")
    expect(card).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_lies_behind_it(page: Page, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    open_everything(page)
    page.locator("#key-panel").evaluate("panel => (panel.hidden = false)")
    generate(page, "abc")
    page.get_by_label("Temperature", exact=True).fill("9")
    page.get_by_role("button", name="Generate").click()
    page.locator(".token").nth(3).hover()
    ratios = page.evaluate(CONTRAST)
    assert len(ratios) > 80
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}
    for kind in ("token p6", "field-error", "share", "hint", "prompt"):
        assert any(kind in name for name in ratios), kind


def test_dark_and_light(browser: Browser, server: LiveServer) -> None:
    def paper(page: Page) -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))

    with visit(browser, server.url, color_scheme="dark") as page:
        assert paper(page) < 150
        page.emulate_media(color_scheme="light")
        assert paper(page) > 600
        page.get_by_label("Theme").select_option("dark")
        assert paper(page) < 150
        page.reload()
        assert paper(page) < 150
        expect(page.get_by_label("Theme")).to_have_value("dark")
        page.get_by_label("Theme").select_option("light")
        page.emulate_media(color_scheme="dark")
        assert paper(page) > 600
        page.get_by_label("Theme").select_option("System")
        assert paper(page) < 150


def test_nothing_sticks_out_of_the_window(page: Page) -> None:
    open_everything(page)
    generate(page, "W" * 50)
    for width, height in ((320, 568), (390, 844), (844, 390), (1280, 800), (2200, 1200)):
        page.set_viewport_size({"width": width, "height": height})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.locator(".token").last.click()
        box = page.get_by_role("tooltip").bounding_box()
        assert box is not None
        assert 0 <= box["x"] <= box["x"] + box["width"] <= width
        assert 0 <= box["y"] <= box["y"] + box["height"] <= height
        small = page.locator("button:visible, select:visible, input:not([type=checkbox]):visible").evaluate_all(
            "all => all.filter((e) => !e.ariaHidden && e.getBoundingClientRect().height < 24).map((e) => e.id)"
        )
        assert small == []  # WCAG 2.2, 2.5.8
    page.set_viewport_size({"width": 1280, "height": 720})


def test_less_motion_where_it_is_asked_for(page: Page, engine: PageEngine) -> None:
    said, engine.script = engine.script, lambda prompt, params: Plan([[97]] * 200, delay=0.02)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".token").first).to_be_visible()
    for choice, animation in (("reduce", "none"), ("no-preference", "blink")):
        page.emulate_media(reduced_motion=choice)  # type: ignore[arg-type]
        caret = "getComputedStyle(document.querySelector('#texts .text'), '::after').animationName"
        assert page.evaluate(caret) == animation
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#progress")).to_contain_text("Stopped")
    engine.script = said


def test_characters_of_several_tokens_are_one_piece(page: Page, engine: PageEngine) -> None:
    said = engine.script
    engine.script = says("né🙂!", chunk=8)
    generate(page)
    engine.script = said
    assert page.locator(".token").all_text_contents() == ["n", "é🙂", "!"]
    page.locator(".token").nth(1).hover()
    expect(page.get_by_role("tooltip").locator("section")).to_have_count(4)
    expect(page.get_by_role("tooltip")).to_contain_text("and 2 more tokens")
