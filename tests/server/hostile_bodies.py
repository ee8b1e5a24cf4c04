"""Bodies of POST /generate that must be refused. CANARY marks what must never come back."""

from __future__ import annotations

import json

CANARY = "xyzzy-canary-7c1f"


def _with(**fields: object) -> bytes:
    return json.dumps({"prompt": CANARY, **fields}).encode()


def _raw(fields: str) -> bytes:
    return f'{{"prompt": "{CANARY}", {fields}}}'.encode()


NUMBERS = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
INTEGERS = ("max_tokens", "min_tokens", "top_k", "seed", "n", "logprobs", "deadline_ms")
NOT_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "true", '"1"', "[]", "{}", "1" + "0" * 400)
NOT_INTEGERS = ("NaN", "1e999", "true", '"1"', "1.5", "[1]", "{}", "-1", "1" + "0" * 400, "1e3")

_TYPED = [_raw(f'"{name}": {value}') for name in NUMBERS for value in NOT_NUMBERS]
_TYPED += [_raw(f'"{name}": {value}') for name in INTEGERS for value in NOT_INTEGERS]
_BOUNDS = [
    _with(temperature=2.01), _with(temperature=-0.1), _with(top_p=0), _with(top_p=1.1), _with(min_p=1.01),
    _with(repetition_penalty=0), _with(repetition_penalty=10.1), _with(presence_penalty=2.1), _with(n=0), _with(n=17),
    _with(frequency_penalty=-2.1), _with(max_tokens=0), _with(n=10**9), _with(logprobs=21), _with(seed=2**63),
    _with(max_tokens=10**9), _with(max_tokens=2**80), _with(min_tokens=6, max_tokens=5), _with(top_k=258),
    _with(top_k=2**40), _with(deadline_ms=0), _with(temperature=None), _with(n=None), _with(stream=None),
]  # fmt: skip
_LISTS = [
    _with(stop=[CANARY] * 17), _with(stop="x" * 257), _with(stop=""), _with(stop=[""]), _with(stop=[1]),
    _with(stop={CANARY: 1}), _with(stop_token_ids=[-1]), _with(stop_token_ids=[257]), _with(stop_token_ids=[1] * 65),
    _with(stop_token_ids=[True]), _with(stop_token_ids=[1.0]), _with(stop_token_ids="1"), _with(logit_bias={"257": 1}),
    _with(logit_bias={"-1": 1}), _with(logit_bias={CANARY: 1}), _with(logit_bias={"1": 101}), _with(logit_bias=[1]),
    _with(logit_bias={str(i): 0 for i in range(1025)}), _with(logit_bias={"9" * 5000: 1}),
    _with(logit_bias={"1": True}), _raw('"logit_bias": {"1": NaN}'),
    _raw('"logit_bias": {"1": 1e999}'), _with(logit_bias={"1.5": 1}),
    *(_with(logit_bias={key: 1}) for key in ("1.0", " 1", "01", "+1", "1_0", "")),
]  # fmt: skip
_PROMPTS = [
    b'{"prompt": null}', b'{"prompt": 5}', b'{"prompt": true}', b'{"prompt": []}', b'{"prompt": [257]}',
    b'{"prompt": [-1]}', b'{"prompt": [true]}', b'{"prompt": [1.0]}', b'{"prompt": ["a"]}', b'{"prompt": [[1]]}',
    b'{"prompt": {"a": 1}}', b'{"prompt": [99999999999999999999]}', b'{"prompt": [1, null]}', _with(prompt="a" * 257),
    b'{"prompt": [1], "max_tokens": 256}', _with(prompt=[1] * 300, max_tokens=None), b'{"prompt": [1e3]}',
]  # fmt: skip
_UNKNOWN = [
    _with(**{CANARY: 1}), _with(best_of=2),
    _with(cache_salt=CANARY), _with(chat_template="{{ x }}"), _with(temprature=1), _with(Temperature=1),
    _with(__proto__={}), _with(inputs="a"), _with(**{"x" * 3000: 1}), _with(**{"../../etc/passwd": 1}), _with(url="x"),
]  # fmt: skip
_NOT_JSON = [
    b"", b" ", b"null", b"[]", b"5", b'"text"', b"true", b"{", b"}", b"{]", b"{'prompt': 'a'}", b'{"prompt"}', b"NaN",
    b'{"prompt": "a",}', b'{"prompt": "a"} {}', b'{"prompt": "a"}x', b"\xff\xfe{}", b"\x00", b"[" * 100_000,
    b'{"prompt": ' + b"[" * 5_000, b'{"a":' * 5_000, b'{"prompt": "\xff\xfe"}', b'{"prompt": "\xed\xa0\x80"}',
    b'\xef\xbb\xbf{"prompt": "a"}', '{"prompt": "a"}'.encode("utf-16"), b'{"prompt": "\\ud800"}',
    b'{"prompt": "\\udfff tail"}', b'{"prompt": "\\ud800\\ud800"}', b'{"prompt": "a", "stop": "\\ud800"}',
    b'{"prompt": "a", "stop": ["\\udc00"]}', b'{"prompt": "a", "model": "\\ud800"}', b'{"prompt": "a", "\\ud800": 1}',
    b'{"prompt": "a", "logit_bias": {"\\ud800": 1}}', b'{"prompt": "a\nb"}', b'{"prompt": "a\x00"}', b"prompt=a",
    b"<xml/>", b'{"prompt": "a", "n": 1e}', b'{"prompt": "a", "n": 01}', b'{"prompt": "a", "n": +1}', b"{" * 9_999,
    b'{"prompt": "a", "n": 0x10}', b'{"prompt": "\\x41"}', b'{"prompt": "a" "n": 1}', b"--", b'{"prompt": "a', b"\x80",
]  # fmt: skip

BODIES: list[bytes] = [*_TYPED, *_BOUNDS, *_LISTS, *_PROMPTS, *_UNKNOWN, *_NOT_JSON]
