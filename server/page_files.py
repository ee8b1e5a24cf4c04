"""The page's files, read once and held in memory: a closed set of paths, each with its type and an entity tag."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

INDEX = "index.html"
REFERENCE = "/docs"
"""Where the API is described, to whoever may see the page."""
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """`etag` is a strong one, quoted as the header wants it (RFC 9110, 8.8.3)."""

    body: bytes
    media_type: str
    etag: str

    def matches(self, if_none_match: str | None) -> bool:
        """Whether the client's copy is this one, by the weak comparison that If-None-Match takes."""
        tags = [tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")]
        return self.etag in tags or tags == ["*"]


@functools.cache
def page_files() -> dict[str, PageFile]:
    """Every file of the page by the path that it is served at; the index is at `/`."""
    files = sorted(path for path in _folder().iterdir() if path.suffix in MEDIA_TYPES)
    return {"/" if path.name == INDEX else f"/static/{path.name}": _load(path) for path in files}


def _folder() -> Path:
    return Path(__file__).parent / "static"


def _load(path: Path) -> PageFile:
    body = path.read_bytes()
    return PageFile(body, MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')
