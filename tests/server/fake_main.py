"""`python -m tests.server.fake_main [options]`: the server's own life over a fake engine, for tests of signals.

The fake engine says `a`, twenty times a second if the prompt is `slow`; the prompt `die` kills it.
FAKE_LOAD_ERROR makes its start fail.
"""

from __future__ import annotations

import asyncio
import os
import sys

import uvloop

from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from server.auth import ApiKeys
from server.cli import listen
from server.lifecycle import Signals
from server.logs import setup_logging
from server.serve import serve
from server.settings import load_settings
from tests.server.fake_engine import FakeEngine, Plan


async def main() -> int:
    settings = load_settings(sys.argv[1:])
    setup_logging(settings.log_level, settings.log_format)
    engine = FakeEngine(state="loading", load_error=os.environ.get("FAKE_LOAD_ERROR"))

    def script(prompt: list[int], params: SamplingParams) -> Plan:
        if bytes(prompt) == b"die":
            asyncio.get_running_loop().call_later(0.2, engine.kill)
        return Plan([[97]] * params.max_tokens, delay=0.05 if bytes(prompt) in (b"slow", b"die") else 0.001)

    engine.script = script
    await engine.start()
    listener = listen(settings.host, settings.port)
    return await serve(settings, ApiKeys([]), listener, engine, Signals(), lambda settings: Tokenizer.bytes())


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.exit(runner.run(main()))
