"""The page over a real server and its engine: what it shows is what the API says."""

from __future__ import annotations

from pathlib import Path

import httpx
from playwright.sync_api import expect

from tests.server.page_browser import generate, launch, visit, written
from tests.server.real import PATIENCE, running, save_random


def test_the_page_writes_what_the_api_answers(tmp_path: Path) -> None:
    with launch() as browser, running(save_random(tmp_path / "random")) as server:
        server.wait_ready()
        with visit(browser, server.url) as page:
            page.get_by_label("Seed").fill("77")
            page.get_by_label("Max tokens").fill("60")
            generate(page, "Once upon a time")
            expect(page.locator("#progress")).to_have_text("Finished after 60 tokens: max tokens reached.")
            text = written(page)
            shades = page.locator(".token").count()
            page.goto(page.evaluate("document.getElementById('replay').href"))
            generate(page)
            assert written(page) == text
            page.locator(".token").nth(20).hover()
            page.get_by_role("button", name="What the filters cut").first.click()
            effects = page.locator("#token-card section").first.locator("ul li")
            expect(effects.first).to_contain_text("temperature moved")
        body = {"prompt": "Once upon a time", "seed": 77, "max_tokens": 60, "temperature": 0.8, "logprobs": 5}
        answer = httpx.post(f"{server.url}/generate", json=body, timeout=PATIENCE).json()["choices"][0]
        assert answer["text"] == text
        assert shades > 40  # characters of several tokens are one piece
        assert httpx.get(f"{server.url}/stats", timeout=PATIENCE).json()["generation_tokens"] == 180
