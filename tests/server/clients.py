"""A client of POST /generate that reads JSON and streamed answers into one shape and counts what must be single."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

TIMEOUT = 120.0


@dataclass
class Choice:
    """One choice as the client has it; `deltas` are the texts of its events, in order."""

    token_ids: list[int] = field(default_factory=list)
    deltas: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    seed: int | None = None
    num_ends: int = 0

    @property
    def text(self) -> str:
        return "".join(self.deltas)

    def add(self, part: dict[str, Any]) -> None:
        """A whole choice of a JSON answer, or a delta of a stream."""
        assert self.num_ends == 0, "nothing follows a choice's end"
        self.token_ids += part["token_ids"]
        self.deltas.append(part["text"])
        if part["logprobs"] is not None:
            self.logprobs = [*(self.logprobs or []), *part["logprobs"]]
        self.finish_reason, self.stop_reason = part["finish_reason"], part["stop_reason"]
        self.num_ends += self.finish_reason is not None


@dataclass
class Answer:
    """`events` are names and data of a stream's events; `body` is a JSON answer."""

    status: int
    headers: httpx.Headers
    body: dict[str, Any] = field(default_factory=dict)
    events: list[tuple[str, str]] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)

    @property
    def code(self) -> str:
        return str(self.body["error"]["code"])

    @property
    def only(self) -> Choice:
        assert len(self.choices) == 1
        return self.choices[0]


def read_events(stream: str) -> Iterator[tuple[str, str]]:
    """Names and data of server-sent events; each has one data line, as the contract says. Comments are passed over."""
    *blocks, rest = stream.split("\n\n")
    assert rest == "", "the stream ended inside an event"
    for block in blocks:
        lines = [line for line in block.split("\n") if not line.startswith(":")]
        names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert len(names) + len(data) == len(lines)
        if lines:
            assert len(data) == 1
            yield (names[0] if names else "message"), data[0]


def read_answer(response: httpx.Response, n: int = 1) -> Answer:
    """Either form of answer, or an error, checked for the form that the contract gives it."""
    answer = Answer(response.status_code, response.headers)
    if response.headers["content-type"].startswith("text/event-stream"):
        answer.choices = [Choice() for _ in range(n)]
        answer.events = list(read_events(response.text))
        _read_stream(answer)
        return answer
    answer.body = response.json()
    for part in answer.body.get("choices", ()):
        choice = Choice(seed=part["seed"])
        choice.add(part)
        answer.choices.append(choice)
    answer.usage = answer.body.get("usage", {})
    return answer


def _read_stream(answer: Answer) -> None:
    for position, (name, data) in enumerate(answer.events):
        left = len(answer.events) - 1 - position
        if name == "error":
            assert left == 0, "an error is a stream's last event"
            answer.body = json.loads(data)
        elif data == "[DONE]":
            assert left == 0
            assert answer.usage, "usage comes before the end"
        else:
            event = json.loads(data)
            for part in event["choices"]:
                answer.choices[part["index"]].add(part)
            if "usage" in event:
                assert (left, event["choices"]) == (1, [])
                answer.usage = event["usage"]
                for choice, seed in zip(answer.choices, event["seeds"], strict=True):
                    choice.seed = seed


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    response = await client.post("/generate", json=body)
    return read_answer(response, body.get("n", 1))


async def ask_and_leave(client: httpx.AsyncClient, body: dict[str, Any], num_events: int) -> Choice:
    """Read that many events of choice 0 in a stream and hang up; what came until then."""
    choice = Choice()
    async with client.stream("POST", "/generate", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                for part in json.loads(line[6:])["choices"]:
                    if part["index"] == 0 and len(choice.deltas) < num_events:
                        choice.add(part)
            if len(choice.deltas) == num_events:
                break
    return choice


async def ask_and_give_up(client: httpx.AsyncClient, body: dict[str, Any], seconds: float) -> None:
    """Hang up after that time, answered or not."""
    with suppress(httpx.ReadTimeout):
        await client.post("/generate", json=body, timeout=httpx.Timeout(TIMEOUT, read=seconds))


def open_client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits, trust_env=False)


def ask_all(url: str, bodies: Sequence[dict[str, Any]], *, at_once: int = 10_000) -> list[Answer]:
    """Send the bodies side by side, at most `at_once` of them in flight; answers in their order."""

    async def run() -> list[Answer]:
        turn = asyncio.Semaphore(at_once)

        async def one(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
            async with turn:
                return await ask(client, body)

        async with open_client(url) as client:
            return await asyncio.gather(*(one(client, body) for body in bodies))

    return asyncio.run(run())


def ask_one(url: str, **body: Any) -> Answer:
    return ask_all(url, [body])[0]
