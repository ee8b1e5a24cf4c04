"""API keys: read once from a file, kept as digests, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from server.settings import UsageError

MIN_KEY_LENGTH = 8


class ApiKeys:
    """The keys that open this server. No keys at all means an open server."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    @property
    def required(self) -> bool:
        return bool(self._digests)

    def number_of(self, authorization: bytes | None) -> int | None:
        """Which key, counted from 1, an Authorization header carries as a bearer token; None where it carries none of
        them. Looks at every key."""
        scheme, _, key = (authorization or b"").partition(b" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return 1 + matches.index(True) if scheme.lower() == b"bearer" and any(matches) else None


def load_api_keys(path: Path | None) -> ApiKeys:
    """Keys from a file, one a line; blank lines and lines that start with # are skipped.

    Raises UsageError when the file cannot be read, holds no key, or holds one that is too short.
    """
    if path is None:
        return ApiKeys([])
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"--api-key-file: {path} cannot be read as UTF-8 text; give a readable file") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise UsageError(f"--api-key-file: {path} holds no key; write one key a line")
    if any(len(key) < MIN_KEY_LENGTH for key in keys):
        raise UsageError(f"--api-key-file: {path} holds a key of under {MIN_KEY_LENGTH} characters; use longer ones")
    return ApiKeys(keys)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
