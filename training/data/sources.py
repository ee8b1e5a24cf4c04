"""What `prepare` is told to read: files, folders, URLs with a sha256, datasets of Hugging Face. Free of torch.

Inputs are checked before anything is downloaded or written; `fetch` then brings them onto this machine.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse

from model.manifest import file_sha256
from training.data.hub_dataset import is_saved_dataset
from training.data.readers import KNOWN_SUFFIXES, file_format
from training.data.scratch import append_scratch
from training.data.token_split import in_threads
from training.errors import DataError, RecipeError

# Short names for `--input`: (URL, sha256).
KNOWN_SOURCES = {
    "tinyshakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    )
}
HUB_PREFIX = "hf:"
_CHUNK = 1 << 20
_DOWNLOAD_TIMEOUT_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Input:
    """One file or dataset, checked as far as that needs no download.

    `location` is a path, a URL or a dataset's name behind `hf:`. `sha256` is "" where it is not known beforehand.
    """

    kind: Literal["file", "url", "dataset"]
    origin: str
    location: str
    sha256: str
    num_bytes: int = 0

    @property
    def is_plain_text(self) -> bool:
        return self.kind != "dataset" and file_format(_url_name(self.location)).kind == "text"


@dataclass(frozen=True, slots=True)
class Source:
    """A file on this machine: `origin` as the user named it, `path` where its bytes are."""

    origin: str
    path: Path
    sha256: str
    num_bytes: int


def check_inputs(
    inputs: Sequence[str], digests: Sequence[str], on_notice: Callable[[str], None] = lambda line: None
) -> list[Input]:
    """`digests` belong to the URLs in the order of `inputs`; a short name brings its own. Folders are walked through.

    Raises RecipeError for a URL without a digest, DataError for a file that is missing or empty.
    """
    if not inputs:
        raise RecipeError("--input names no text: give a file, a folder, a URL, hf:OWNER/NAME or a short name")
    remaining = list(digests)
    checked: list[Input] = []
    for item in inputs:
        if item in KNOWN_SOURCES and not Path(item).exists():
            checked.append(Input("url", KNOWN_SOURCES[item][0], *KNOWN_SOURCES[item]))
        elif urlparse(item).scheme in ("http", "https"):
            if not remaining:
                raise RecipeError(f"{item}: a URL needs --sha256 with the digest of its content")
            checked.append(Input("url", item, item, remaining.pop(0).lower()))
        elif item.startswith(HUB_PREFIX):
            checked.append(Input("dataset", item, item.removeprefix(HUB_PREFIX), ""))
        else:
            checked.extend(_local(item, on_notice))
    if remaining:
        raise RecipeError("--sha256 is given more often than there are URLs in --input")
    return checked


def fetch(item: Input, folder: Path) -> Source:
    """Local files stay where they are; URLs are downloaded into `folder`. Raises DataError for another digest."""
    if item.kind == "file":
        return Source(item.origin, Path(item.location), item.sha256, item.num_bytes)
    target = folder / str(len(list(folder.iterdir()))) / (_url_name(item.location) or "input")
    path = _download(item.location, item.sha256, target)
    return Source(item.origin, path, item.sha256, path.stat().st_size)


def _local(item: str, on_notice: Callable[[str], None]) -> list[Input]:
    path = Path(item)
    if path.is_dir():
        return _saved_dataset(path) if is_saved_dataset(path) else _folder(path, on_notice)
    if not path.is_file():
        raise DataError(f"{item}: no such file")
    if path.stat().st_size == 0:
        raise DataError(f"{item}: the file is empty")
    return [Input("file", path.name, str(path), file_sha256(path), path.stat().st_size)]


def _folder(folder: Path, on_notice: Callable[[str], None]) -> list[Input]:
    """Every file below the folder whose name ends in a known way, sorted by path; hidden ones are passed over."""
    visible = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_hidden(path, folder)]
    known = [path for path in visible if file_format(path.name).is_known and path.stat().st_size]
    others = len(visible) - len(known)
    if not known:
        raise DataError(f"{folder}: holds no file that ends in {', '.join(KNOWN_SUFFIXES)}; name the files themselves")
    if others:
        first = next(path for path in visible if path not in set(known))
        on_notice(
            f"{folder}: left out, as empty or of an unknown kind: {others} of {len(visible)} files, first {first.name}"
        )
    digests = in_threads(file_sha256, known)
    return [
        Input("file", str(path.relative_to(folder.parent)), str(path), digest, path.stat().st_size)
        for path, digest in zip(known, digests, strict=True)
    ]


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _saved_dataset(folder: Path) -> list[Input]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    lines = [
        f"{digest}  {path.relative_to(folder)}\n"
        for path, digest in zip(paths, in_threads(file_sha256, paths), strict=True)
    ]
    return [Input("dataset", folder.name, str(folder), hashlib.sha256("".join(lines).encode()).hexdigest())]


def _url_name(location: str) -> str:
    return Path(urlparse(location).path).name


def _download(url: str, sha256: str, target: Path) -> Path:
    """Writes beside the target, compares the digest, then renames, so a target is always whole and right."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".part")
    try:
        timeout = _DOWNLOAD_TIMEOUT_SECONDS
        with urllib.request.urlopen(url, timeout=timeout) as answer, partial.open("wb", buffering=0) as file:
            while chunk := answer.read(_CHUNK):
                append_scratch(file, chunk, "the download")
        found = file_sha256(partial)
        if found != sha256:
            raise DataError(f"{url}: sha256 is {found}, not {sha256}; the content has changed or the digest is wrong")
        os.replace(partial, target)
    # HTTPException and ValueError: addresses that no request can be made of, and answers that break off. OSError: the
    # network's errors have no class in common.
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise DataError(f"{url}: cannot be downloaded ({reason}); download it elsewhere and pass the file") from None
    finally:
        partial.unlink(missing_ok=True)
    return target
