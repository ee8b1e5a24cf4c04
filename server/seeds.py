"""Seeds that nobody chose, and those that follow from a chosen one."""

from __future__ import annotations

import hashlib
import secrets

_BITS = 53  # JSON numbers above 2^53 are not exact in every client


def draw_seed() -> int:
    return secrets.randbits(_BITS)


def choice_seed(seed: int, index: int) -> int:
    """Choice 0 draws with the request's own seed, the others with seeds hashed from it and their index."""
    return seed if index == 0 else derived_seed(seed, str(index))


def derived_seed(seed: int, name: str) -> int:
    """A seed for what `name` tells from its siblings."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - _BITS)
