"""The page in a real browser: generate, stream, stop, errors, keys, replay links, themes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import msgspec
import pytest
from playwright.sync_api import Browser, Page, Route, expect

from model.sampling_params import SamplingParams
from tests.server.fake_engine import Plan, says
from tests.server.live import LiveServer, wait_until
from tests.server.page_browser import PageEngine, Tab, generate, launch, text_of, visit, written

KEY = "correct-horse-battery"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launch() as browser:
        yield browser


@pytest.fixture
def engine() -> PageEngine:
    return PageEngine()


@pytest.fixture
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


def open_section(page: Page, name: str) -> None:
    page.get_by_text(name, exact=True).click()


def test_it_writes_what_the_engine_says(page: Page, engine: PageEngine) -> None:
    engine.script = says("Whether 'tis nobler")
    generate(page, "To be: ")
    assert written(page) == "Whether 'tis nobler"
    expect(page.get_by_role("status").first).to_have_text("Finished after 19 tokens: max tokens reached.")
    assert page.locator("[data-figure=tokens]").inner_text() == "19"
    assert re.fullmatch(r"\d+ ms", page.locator("[data-figure=first]").inner_text())
    assert page.locator("[data-figure=prompt]").inner_text() == "7"
    [stream] = engine.submitted
    assert bytes(stream.prompt) == b"To be: "
    assert stream.params.seed == int(page.locator("#seed-used").inner_text())


def test_every_control_reaches_the_engine(page: Page, engine: PageEngine) -> None:
    for name in ("Filters and penalties", "Where it ends", "What comes back"):
        open_section(page, name)
    for label, value in (
        ("Temperature", "0.35"), ("Top p", "0.9"), ("Max tokens", "9"), ("Seed", str(2**63 - 1)), ("Top k", "40"),
        ("Min p", "0.05"), ("Repetition penalty", "1.2"), ("Presence penalty", "-0.5"), ("Frequency penalty", "0.25"),
        ("Logit bias", "13: -5\n 7 = 2.5 "), ("Stop strings", "q\\n\nz"), ("Stop token ids", "3, 5 8"),
        ("Min tokens", "2"), ("Deadline (ms)", "60000"), ("Choices", "1"), ("Alternatives a token", "3"),
    ):  # fmt: skip
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_label("Go on past the end-of-text token").check()
    page.get_by_label("The prompt is given as").select_option("token ids")
    generate(page, "84, 111")
    [stream] = engine.submitted
    assert stream.prompt == [84, 111]
    assert stream.deadline is not None
    assert stream.params == SamplingParams(
        temperature=0.35, top_p=0.9, max_tokens=9, seed=2**63 - 1, top_k=40, min_p=0.05, repetition_penalty=1.2,
        presence_penalty=-0.5, frequency_penalty=0.25, logit_bias={13: -5.0, 7: 2.5}, stop_token_ids=(3, 5, 8),
        min_tokens=2, logprobs=3, ignore_eos=True,
    )  # fmt: skip


def test_stop_strings_and_choices(page: Page, engine: PageEngine) -> None:
    engine.script = says("one\ntwo\nthree")
    open_section(page, "Where it ends")
    open_section(page, "What comes back")
    page.get_by_label("Stop strings").fill("\\nthree")
    page.get_by_label("Choices").fill("2")
    page.get_by_label("Show the prompt in front of the text").uncheck()
    generate(page)
    texts = page.locator("#texts .text").all_text_contents()
    assert texts == ["one\ntwo", "one\ntwo"]
    expect(page.get_by_role("heading", name="Choice 2")).to_have_text("Choice 2 · a stop string came")
    expect(page.locator("#progress")).to_have_text("Finished after 26 tokens: a stop string came.")


def test_empty_max_tokens_asks_for_the_rest_of_the_context(page: Page, engine: PageEngine) -> None:
    page.get_by_label("Max tokens").fill("")
    generate(page, "abcdef")
    assert engine.submitted[0].params.max_tokens == 256 - 6


def test_text_arrives_while_it_is_written(page: Page, engine: PageEngine) -> None:
    engine.script = lambda prompt, params: Plan([[97]] * 40, delay=0.05)
    seen = []
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#progress")).to_have_text("Generating …")
    expect(page.locator("#texts")).to_have_attribute("aria-busy", "true")
    expect(page.locator(".token").nth(2)).to_be_visible()
    seen.append(len(written(page)))
    expect(page.locator(".token").nth(20)).to_be_visible()
    seen.append(len(written(page)))
    expect(page.locator("#texts")).to_have_attribute("aria-busy", "false")
    seen.append(len(written(page)))
    assert 3 <= seen[0] < seen[1] < seen[2] == 40
    rate = float(page.locator("[data-figure=rate]").inner_text().removesuffix(" /s"))
    assert 5 < rate <= 20.5  # a token every 50 ms at most


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_the_request_and_keeps_the_text(page: Page, engine: PageEngine, how: str) -> None:
    engine.script = lambda prompt, params: Plan([[97]] * params.max_tokens, delay=0.02)
    page.get_by_role("button", name="Generate").press("Enter")
    expect(page.locator(".token").nth(4)).to_be_visible()
    assert engine.live
    expect(page.get_by_role("button", name="Stop")).to_be_focused()
    if how == "button":
        page.keyboard.press("Enter")
    else:
        page.keyboard.press("Escape")
    expect(page.locator("#progress")).to_contain_text("Stopped after")
    wait_until(lambda: not engine.live)
    assert engine.submitted[0].aborted
    assert 5 <= len(written(page)) < 200
    expect(page.get_by_role("button", name="Generate")).to_be_focused()
    engine.script = says("again")
    generate(page)
    assert written(page) == "again"


def test_a_mistake_is_told_at_its_field_and_nothing_is_sent(page: Page, engine: PageEngine) -> None:
    open_section(page, "Filters and penalties")
    for label, wrong, right, words in (
        ("Temperature", "3", "1", "Write a number from 0 to 2."),
        ("Top k", "1.5", "", "Write a whole number from 0 to 257."),
        ("Seed", "-1", "", "from 0 to 2^63"),
        ("Seed", "9223372036854775808", "", "from 0 to 2^63"),
        ("Logit bias", "13: 200", "", "one token id and its bias"),
    ):
        field = page.get_by_label(label, exact=True)
        field.fill(wrong)
        page.get_by_role("button", name="Generate").click()
        expect(field).to_be_focused()
        expect(field).to_have_attribute("aria-invalid", "true")
        error = page.locator(f"#{field.get_attribute('aria-errormessage')}")
        expect(error).to_contain_text(words)
        field.fill(right)
        expect(error).to_have_count(0)
    assert engine.submitted == []
    generate(page)
    assert len(engine.submitted) == 1


def test_the_servers_refusal_of_a_field_is_told_there(page: Page, engine: PageEngine) -> None:
    page.get_by_label("Max tokens").fill("256")
    page.get_by_role("button", name="Generate").click()
    field = page.get_by_label("Max tokens")
    expect(field).to_be_focused()
    expect(page.locator("#max_tokens-error")).to_contain_text("more than the model's context of 256 tokens")
    open_section(page, "Filters and penalties")
    field.fill("20")
    page.get_by_label("Repetition penalty").fill("0")
    open_section(page, "Filters and penalties")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_label("Repetition penalty")).to_be_focused()  # its section opens for it
    expect(page.locator("#repetition_penalty-error")).to_contain_text("must be a number above 0 and up to 10")


def test_a_full_queue_says_when_to_come_back(page: Page, engine: PageEngine) -> None:
    engine.queue_limit = 0
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("The request queue is full; try again later. Try again in 7 s.")
    assert re.search(r"\(req-[0-9a-f]+\)", page.get_by_role("alert").inner_text())
    expect(page.locator("#result")).to_be_hidden()
    engine.queue_limit = 8
    generate(page)
    expect(page.locator("#notice")).to_be_hidden()


def test_a_fault_in_the_middle_keeps_what_came(page: Page, engine: PageEngine) -> None:
    engine.script = lambda prompt, params: Plan([[97]] * 9, delay=0.005, fail_after=5)
    generate(page)
    expect(page.locator("#notice")).to_contain_text("gave up on this request")
    expect(page.locator("#progress")).to_have_text("Ended by an error after 5 tokens.")
    assert written(page) == "aaaaa"


def test_a_connection_that_breaks_is_told(page: Page, engine: PageEngine) -> None:
    start = 'data: {"id":"g","choices":[{"index":0,"text":"ab","token_ids":[97,98],"finish_reason":null,'
    body = start + '"stop_reason":null,"logprobs":null}]}\n\ndata: {"id'
    page.route("**/generate", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    generate(page)
    expect(page.locator("#notice")).to_have_text("The connection ended before the answer was complete.")
    assert written(page) == "ab"
    page.unroute("**/generate")
    page.route("**/generate", lambda route: route.abort())
    generate(page)
    expect(page.locator("#notice")).to_have_text("The server cannot be reached.")
    page.unroute("**/generate")
    page.route("**/generate", lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>"))
    generate(page)
    expect(page.locator("#notice")).to_have_text("The server answered with status 502.")


def test_a_key_is_asked_for_kept_in_the_tab_and_forgotten(browser: Browser, engine: PageEngine) -> None:
    with LiveServer(engine, keys=[KEY]) as server, visit(browser, server.url, ready=False) as page:
        field = page.get_by_label("API key", exact=True)
        expect(field).to_be_focused()
        expect(page.get_by_role("button", name="Generate")).to_be_disabled()
        expect(page.locator("#state-words")).to_have_text("API key needed")
        field.fill("wrong-key")
        page.get_by_role("button", name="Use this key").click()
        expect(page.locator("#key-message")).to_have_text("That key does not open this server.")
        field.fill(KEY)
        field.press("Enter")
        expect(field).to_be_hidden()
        generate(page)
        assert written(page)
        expect(page.locator("#state-words")).to_have_text("Ready")
        kept = page.evaluate("[Object.values(sessionStorage), Object.values(localStorage), document.cookie]")
        assert kept == [[KEY], [], ""]
        assert KEY not in page.url + str(page.locator("#replay").get_attribute("href")) + page.content()
        page.reload()
        expect(page.get_by_role("button", name="Generate")).to_be_enabled()
        page.get_by_role("button", name="Forget the API key").click()
        expect(field).to_be_visible()
        assert page.evaluate("sessionStorage.length") == 0
        expect(page.get_by_role("button", name="Generate")).to_be_disabled()


def test_a_replay_link_fills_the_form_and_gives_the_same_text(browser: Browser, server: LiveServer) -> None:
    prompt = 'A "prompt" & #more\n= <b>two</b> lines + café 🙂'
    with visit(browser, server.url) as page:
        page.get_by_label("Temperature", exact=True).fill("0.333333333333")
        page.get_by_label("Max tokens").fill("60")
        open_section(page, "Where it ends")
        page.get_by_label("Stop strings").fill("zzz\n\\n\\n")
        page.get_by_label("Go on past the end-of-text token").check()
        generate(page, prompt)
        text, seed = written(page), page.locator("#seed-used").inner_text()
        link = page.evaluate("document.getElementById('replay').href")
    assert link.startswith(f"{server.url}/#")
    with visit(browser, link) as page:
        assert page.get_by_label("Prompt", exact=True).input_value() == prompt
        assert page.get_by_label("Temperature", exact=True).input_value() == "0.333333333333"
        assert page.get_by_label("Seed").input_value() == seed
        assert page.get_by_label("Stop strings").input_value() == "zzz\n\\n\\n"
        expect(page.get_by_label("Stop strings")).to_be_visible()
        expect(page.get_by_label("Go on past the end-of-text token")).to_be_checked()
        assert len(server.engine.submitted) == 1  # opening a link fills the form and sends nothing
        generate(page)
        assert written(page) == text
        page.reload()
        expect(page.get_by_label("Seed")).to_have_value(seed)
        page.get_by_role("button", name="Reset").click()
        assert page.get_by_label("Temperature", exact=True).input_value() == "0.8"
        assert page.get_by_label("Prompt", exact=True).input_value() == prompt
    first, second = server.engine.submitted
    assert (first.prompt, first.params) == (second.prompt, second.params)


def test_a_link_to_other_weights_says_so(browser: Browser, server: LiveServer) -> None:
    with visit(browser, f"{server.url}/#prompt=abc&weights=0123456789abcdef") as page:
        expect(page.locator("#notice")).to_contain_text("made with other weights")
        assert page.get_by_label("Prompt", exact=True).input_value() == "abc"
        page.goto(f"{server.url}/#prompt=def&weights=abc&temperature=x&no_such=1")
        expect(page.get_by_label("Prompt", exact=True)).to_have_value("def")
        expect(page.locator("#notice")).to_be_hidden()


def test_what_the_model_says_is_text_and_nothing_else(page: Page, engine: PageEngine) -> None:
    hostile = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>&lt;b&gt;"
    engine.script = says(hostile)
    generate(page, "<b>bold</b>")
    assert written(page) == hostile
    assert text_of(page.locator("#texts .prompt")) == "<b>bold</b>"
    assert page.locator("#texts img, #texts script, #token-card img").count() == 0
    assert page.title() == "Quill"
    page.locator(".token").first.hover()
    expect(page.get_by_role("tooltip")).to_contain_text("<")


def test_no_shading_without_log_probabilities(page: Page, engine: PageEngine) -> None:
    engine.script = says("plain text")
    open_section(page, "What comes back")
    page.get_by_label("Alternatives a token").fill("")
    generate(page)
    assert engine.submitted[0].params.logprobs is None
    assert written(page) == "plain text"
    assert page.locator(".token").count() == 0


def test_the_engine_is_seen_at_work(page: Page, engine: PageEngine) -> None:
    values = {"num_running": 3, "num_waiting": 1200, "num_blocks": 200, "num_free_blocks": 150}
    engine.set_stats(**values, generation_tokens=1000, prefix_cache_queries=40, prefix_cache_hits=10, num_preemptions=6)
    for id, value in (("running", "3"), ("waiting", "1,200"), ("kv", "25 %"), ("prefix", "25 %"), ("preemptions", "6")):
        expect(page.locator(f"#engine-{id}")).to_have_text(value)
    expect(page.locator("#engine-rate")).to_have_text("0")
    engine.set_stats(**values, generation_tokens=1500)
    expect(page.locator("#engine-rate")).not_to_have_text("0")
    rate = int(page.locator("#engine-rate").inner_text().replace(",", ""))
    assert 50 < rate <= 500  # 500 more tokens, seen a second or more after the last look
    engine.kill()
    expect(page.locator("#state-words")).to_have_text("The engine is down")


def test_the_model_and_where_it_comes_from(page: Page) -> None:
    card = page.get_by_role("region", name="Model")
    for words in ("tiny", "1,234", "2 layers", "257", "256 tokens", "a test's CPU", "float32", "abc", "run-1", "5,000"):
        expect(card).to_contain_text(words)
    card.get_by_text("Everything the server says").click()
    assert json.loads(card.locator("pre").inner_text())["models"][0]["name"] == "tiny"


def with_models(route: Route) -> None:
    info = route.fetch().json()
    [model] = info["models"]
    labels = {**model, "name": "labels", "task": "classification"}
    info["models"] = [model, {**model, "name": "second", "num_parameters": 7_000_000}, labels]
    route.fulfill(json=info)


def test_several_models(page: Page) -> None:
    page.route("**/info", with_models)
    page.reload()
    select = page.get_by_label("Model", exact=True)
    expect(select.locator("option")).to_have_text(["tiny", "second", "labels"])
    select.select_option("second")
    expect(page.get_by_role("region", name="Model")).to_contain_text("7 million")
    with page.expect_request("**/generate") as sent:
        page.get_by_role("button", name="Generate").click()
    assert sent.value.post_data_json["model"] == "second"
    expect(page.locator("#model-error")).to_contain_text("Model is not served here")
    select.select_option("labels")
    expect(page.get_by_role("button", name="Generate")).to_be_disabled()
    expect(page.locator("#notice")).to_contain_text("POST /classify")


def test_other_weights_are_seen_by_the_answer_they_gave(page: Page, engine: PageEngine) -> None:
    """As after a reload in the server: the card follows, and the replay link names the weights that wrote the text."""
    generate(page)
    expect(page.locator("#weights-used")).to_have_text("abc, step 5000")
    [model] = engine._info.models
    newer = msgspec.structs.replace(model, weights_digest="sha256:0123456789abcdef0123", provenance={"step": 6000})
    engine._info = msgspec.structs.replace(engine._info, models=[newer])
    generate(page)
    expect(page.locator("#weights-used")).to_have_text("0123456789ab, step 6000")
    expect(page.locator("#model-provenance")).to_contain_text("6,000")
    assert "weights=0123456789abcdef" in str(page.locator("#replay").get_attribute("href"))


def test_it_waits_for_a_model_that_loads(browser: Browser) -> None:
    engine = PageEngine(state="loading")
    with LiveServer(engine) as server, visit(browser, server.url, ready=False) as page:
        expect(page.locator("#state-words")).to_have_text("Loading the model")
        expect(page.get_by_role("button", name="Generate")).to_be_disabled()
        engine._state = "ready"
        expect(page.get_by_role("button", name="Generate")).to_be_enabled()
        expect(page.locator("#state-words")).to_have_text("Ready")
