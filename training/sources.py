"""Where training text comes from: local UTF-8 files, or a URL with the sha256 that its content must have.

A source is read as a stream, so that a file larger than memory can be prepared. Free of torch.
"""

from __future__ import annotations

import http.client
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

from model.manifest import file_sha256
from training.errors import DataError, RecipeError

# Short names for `--input`: (URL, sha256).
KNOWN_SOURCES = {
    "tinyshakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    )
}
_CHUNK = 1 << 20
_DOWNLOAD_TIMEOUT_SECONDS = 60
# A line end between two characters that are not white space. Byte, character and GPT-2 tokenizers never
# join tokens across it, so that text cut there encodes to the same ids as the whole.
_SAFE_CUT = re.compile(r"(?<=\S)\n(?=\S)")


@dataclass(frozen=True, slots=True)
class Source:
    """One document of text: `origin` as the user named it, `path` where its bytes are."""

    origin: str
    path: Path
    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Input:
    """What the user named, checked as far as that needs no download: a local file or a URL with its digest."""

    origin: str
    sha256: str
    file_name: str
    path: Path | None = None


def check_inputs(inputs: Sequence[str], digests: Sequence[str]) -> list[Input]:
    """`digests` belong to the URLs in the order of `inputs`; a short name brings its own.

    Raises RecipeError for a URL without a digest, DataError for a file that is missing or empty.
    """
    if not inputs:
        raise RecipeError("--input names no text: give a file, a URL or a short name")
    remaining = list(digests)
    checked: list[Input] = []
    for item in inputs:
        if item in KNOWN_SOURCES and not Path(item).exists():
            url, digest = KNOWN_SOURCES[item]
            checked.append(Input(url, digest, f"{item}.txt"))
        elif urlparse(item).scheme in ("http", "https"):
            if not remaining:
                raise RecipeError(f"{item}: a URL needs --sha256 with the digest of its content")
            name = f"{len(checked)}-{Path(urlparse(item).path).name or 'input'}"
            checked.append(Input(item, remaining.pop(0).lower(), name))
        else:
            checked.append(_local(item))
    if remaining:
        raise RecipeError("--sha256 is given more often than there are URLs in --input")
    return checked


def fetch(item: Input, folder: Path) -> Source:
    """Local files stay where they are; URLs are downloaded into `folder`. Raises DataError for another digest."""
    path = item.path or _download(item.origin, item.sha256, folder / item.file_name)
    return Source(item.origin, path, item.sha256, path.stat().st_size)


def read_text(source: Source) -> Iterator[str]:
    """The text in chunks of about a million characters, line ends untouched. Raises DataError if not UTF-8."""
    try:
        with source.path.open(encoding="utf-8", newline="") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source.origin}: not UTF-8 text (byte {error.object[error.start]:#x}); convert it first"
        ) from None


def read_pieces(source: Source, *, cut: bool) -> Iterator[str]:
    """The text in pieces that may be encoded one by one; the whole text as one piece when not `cut`."""
    if not cut:
        yield "".join(read_text(source))
        return
    rest = ""
    for chunk in read_text(source):
        rest += chunk
        end = _last_cut(rest, max(0, len(rest) - len(chunk) - 2))
        if end:
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def _last_cut(text: str, start: int) -> int:
    """End of the last safe cut at or after `start`; 0 where there is none."""
    ends = [match.end() for match in _SAFE_CUT.finditer(text, start)]
    return ends[-1] if ends else 0


def _local(item: str) -> Input:
    path = Path(item)
    if path.is_dir():
        raise DataError(f"{item}: a folder; name the text files in it one by one")
    if not path.is_file():
        raise DataError(f"{item}: no such file")
    if path.stat().st_size == 0:
        raise DataError(f"{item}: the file is empty")
    return Input(path.name, file_sha256(path), path.name, path)


def _download(url: str, sha256: str, target: Path) -> Path:
    """Writes beside the target, compares the digest, then renames, so a target is always whole and right."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".part")
    try:
        with urllib.request.urlopen(url, timeout=_DOWNLOAD_TIMEOUT_SECONDS) as answer, partial.open("wb") as file:
            shutil.copyfileobj(answer, file, _CHUNK)
        found = file_sha256(partial)
        if found != sha256:
            raise DataError(f"{url}: sha256 is {found}, not {sha256}; the content has changed or the digest is wrong")
        os.replace(partial, target)
    # HTTPException and ValueError: addresses that no request can be made of, and answers that break off.
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise DataError(f"{url}: cannot be downloaded ({reason}); download it elsewhere and pass the file") from None
    finally:
        partial.unlink(missing_ok=True)
    return target
