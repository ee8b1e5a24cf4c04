"""Frames of msgpack over a socket: four bytes of length, then the message."""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Iterator

_LENGTH = struct.Struct("<I")
_CHUNK = 1 << 18


class FrameSplitter:
    """Cuts a byte stream into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[memoryview]:
        """The frames that `data` completes. A view is valid until the next one is asked for."""
        self._buffer += data
        start = 0
        with memoryview(self._buffer) as view:
            while len(view) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(view, start)
                end = start + _LENGTH.size + length
                if end > len(view):
                    break
                with view[start + _LENGTH.size : end] as frame:
                    yield frame
                start = end
        del self._buffer[:start]


def frame(payload: bytes) -> bytes:
    return _LENGTH.pack(len(payload)) + payload


class SocketChannel:
    """The engine's side: blocking or polling reads, blocking writes."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._splitter = FrameSplitter()

    def receive(self, timeout: float) -> list[bytes]:
        """Messages that are there now, after waiting up to `timeout` seconds for the first.

        Raises EOFError when the other side is gone.
        """
        readable, _, _ = select.select([self._socket], [], [], timeout)
        if not readable:
            return []
        data = self._socket.recv(_CHUNK)
        if not data:
            raise EOFError
        return [bytes(message) for message in self._splitter.feed(data)]

    def send(self, payload: bytes) -> None:
        """Raises BrokenPipeError when the other side is gone."""
        self._socket.sendall(frame(payload))
