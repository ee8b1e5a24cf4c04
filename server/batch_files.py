"""The two files of a batch: OpenAI's request lines in, one answer line for each of them out.

An answer is appended in one piece as soon as it is known, so that a process that is killed leaves at most one torn
line, which the next run cuts off. What identifies a line is its custom_id; a line without a usable one is identified
by its number.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from server.settings import UsageError

URLS = ("/v1/completions", "/v1/chat/completions", "/generate", "/classify", "/score")
MAX_CUSTOM_ID = 512
ID_PREFIX = "batch_req_"
_BOM = b"\xef\xbb\xbf"
_START = f'{{"id":"{ID_PREFIX}'.encode()


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One line of the input. `problem` says why it cannot be asked at all; `custom_id` is None where it has none."""

    line: int
    custom_id: str | None
    url: str = ""
    body: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


class BatchResponse(msgspec.Struct):
    status_code: int
    request_id: str
    body: msgspec.Raw


class BatchError(msgspec.Struct):
    code: str
    message: str
    line: int


class BatchAnswer(msgspec.Struct):
    """One line of the output, in OpenAI's shape. `error` repeats a refusal and adds the number of the input's line."""

    id: str
    custom_id: str | None
    response: BatchResponse
    error: BatchError | None


class _ErrorLine(msgspec.Struct):
    line: int


class _WrittenAnswer(msgspec.Struct):
    id: str
    custom_id: str | None
    response: dict[str, object]
    error: _ErrorLine | None


_written = msgspec.json.Decoder(_WrittenAnswer)


def read_requests(path: Path) -> Iterator[BatchRequest]:
    """The input's lines in order, blank ones left out. Raises UsageError if the file cannot be read."""
    seen: set[str] = set()
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                content = (line.removeprefix(_BOM) if number == 1 else line).strip()
                if content:
                    request = _parse(number, content)
                    if request.custom_id in seen:
                        request = BatchRequest(number, None, problem="custom_id is that of an earlier line")
                    elif request.custom_id is not None:
                        seen.add(request.custom_id)
                    yield request
    except OSError as error:
        raise UsageError(f"--input: {path} cannot be read ({error.strerror}); give a file of request lines") from None


def _parse(number: int, line: bytes) -> BatchRequest:
    try:
        values = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return BatchRequest(number, None, problem="the line is not valid JSON in UTF-8")
    if not isinstance(values, dict):
        return BatchRequest(number, None, problem="the line is not a JSON object")
    custom_id, url, body = values.get("custom_id"), values.get("url"), values.get("body")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID:
        rule = f"custom_id must be a string of 1 to {MAX_CUSTOM_ID} characters"
        return BatchRequest(number, None, problem=rule)
    if values.get("method") != "POST":
        return BatchRequest(number, custom_id, problem="method must be POST")
    if url not in URLS:
        return BatchRequest(number, custom_id, problem=f"url must be one of {', '.join(URLS)}")
    if not isinstance(body, dict):
        return BatchRequest(number, custom_id, problem="body must be a JSON object")
    if body.get("stream"):
        return BatchRequest(number, custom_id, problem="body.stream must be false: a batch has nobody to stream to")
    return BatchRequest(number, custom_id, url, body)


def _is_torn(line: bytes) -> bool:
    """Whether that is how an answer begins; a file system that lost power may leave zeros for its text."""
    return not line.endswith(b"\n") and (line.startswith(_START) or _START.startswith(line) or not line.strip(b"\0"))


class AnswerFile:
    """The output, open for appending by this process alone; what it holds already is kept.

    Raises UsageError for a file that is no batch's output or that another process writes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._custom_ids: set[str] = set()
        self._lines: set[int] = set()
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UsageError(f"--output: {path} cannot be written ({error.strerror}); choose another file") from None
        try:
            self._lock()
            self._read()
        except BaseException:
            os.close(self._descriptor)
            raise

    @property
    def num_answers(self) -> int:
        return len(self._custom_ids) + len(self._lines)

    def answers(self, request: BatchRequest) -> bool:
        """Whether the request has its line already."""
        if request.custom_id is None:
            return request.line in self._lines
        return request.custom_id in self._custom_ids

    def append(self, request: BatchRequest, answer: BatchAnswer) -> None:
        """Raises OSError when the disk refuses."""
        data = memoryview(msgspec.json.encode(answer) + b"\n")
        while data:
            data = data[os.write(self._descriptor, data) :]
        self._remember(answer.custom_id, request.line)

    def close(self) -> None:
        """Flush to disk. Raises OSError when it refuses."""
        try:
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--output: another batch writes {self._path}; wait for it or choose another") from None
        except OSError:
            pass  # some network file systems have no locks

    def _read(self) -> None:
        """Remember what is answered and cut off a torn last line."""
        whole = 0
        with open(self._descriptor, "rb", closefd=False) as file:
            file.seek(0)
            for number, line in enumerate(file, 1):
                try:
                    answer = _written.decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError):
                    if _is_torn(line):
                        break
                    raise UsageError(
                        f"--output: line {number} of {self._path} is no answer of a batch; choose another file"
                    ) from None
                self._remember(answer.custom_id, 0 if answer.error is None else answer.error.line)
                whole += len(line)
                if not line.endswith(b"\n"):
                    os.write(self._descriptor, b"\n")
                    return
        os.ftruncate(self._descriptor, whole)

    def _remember(self, custom_id: str | None, line: int) -> None:
        if custom_id is None:
            self._lines.add(line)
        else:
            self._custom_ids.add(custom_id)
