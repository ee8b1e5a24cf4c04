"""StreamDecoder: the text of a growing list of tokens, piece by piece, never with half a character. Free of torch."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from model.errors import TokenizerError
from model.tokenizer.pieces import TokenPieces

if TYPE_CHECKING:
    import tokenizers

    from model.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"


class Collector(Protocol):
    """Gathers the bytes of one text, token by token."""

    def push(self, ids: Sequence[int]) -> bytes:
        """The bytes that these tokens add. Raises TokenizerError for an id that is no token, taking in none."""
        ...

    def finish(self) -> bytes:
        """What was held back until the end was known."""
        ...


class StreamDecoder:
    """Decodes one sequence's tokens as they come.

    The deltas, joined, are `tokenizer.decode` of all the ids; bytes that are not valid UTF-8 become U+FFFD as in
    `bytes.decode("utf-8", "replace")`. At most three bytes are held back. A push takes constant time per token,
    except under a decoder that only the `tokenizers` library can run, where it takes that of a short window.
    """

    __slots__ = ("_collector", "_pending")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._collector = tokenizer.collector()
        self._pending = b""

    def push(self, ids: Sequence[int]) -> str:
        """The text that became certain with these ids; may be empty. Raises TokenizerError for an id that is no
        token, and takes in none of the ids then."""
        data = self._collector.push(ids)
        if self._pending:
            data = self._pending + data
        text, num_used = utf_8_decode(data, "replace", False)
        self._pending = data[num_used:]
        return text

    def finish(self) -> str:
        """The rest of the text. Nothing may be pushed afterwards."""
        text = (self._pending + self._collector.finish()).decode("utf-8", "replace")
        self._pending = b""
        return text


class PlainCollector:
    """Each token always adds the same bytes."""

    __slots__ = ("_pieces",)

    def __init__(self, pieces: Mapping[int, bytes]) -> None:
        self._pieces = pieces

    def push(self, ids: Sequence[int]) -> bytes:
        try:
            if len(ids) == 1:
                return self._pieces[ids[0]]
            return b"".join(map(self._pieces.__getitem__, ids))
        except KeyError as missing:
            raise unknown_id(missing.args[0]) from None

    def finish(self) -> bytes:
        return b""


class PlacedCollector:
    """The start of the text is special, or words owe a space to what follows them."""

    def __init__(self, pieces: TokenPieces) -> None:
        self._pieces = pieces
        self._is_first = True
        self._owes_space = False
        self._to_strip = pieces.strip_count

    def push(self, ids: Sequence[int]) -> bytes:
        unknown = next((i for i in ids if i not in self._pieces.later), None)
        if unknown is not None:
            raise unknown_id(unknown)
        data = b"".join(self._take(i) for i in ids if i not in self._pieces.special)
        if self._to_strip and data:
            return self._strip_start(data)
        return data

    def finish(self) -> bytes:
        return b""

    def _take(self, token_id: int) -> bytes:
        pieces = self._pieces
        table = pieces.first if self._is_first and pieces.first is not None else pieces.later
        self._is_first = False
        data = b" " + table[token_id] if self._owes_space else table[token_id]
        self._owes_space = token_id in pieces.owing_space
        return data

    def _strip_start(self, data: bytes) -> bytes:
        strip = self._pieces.strip
        while self._to_strip and data.startswith(strip):
            data = data[len(strip) :]
            self._to_strip -= 1
        if data:
            self._to_strip = 0
        return data


class WindowCollector:
    """For decoders that are not known to be local: the library decodes the last tokens again at each push.

    Emits what the window's text has grown by, and holds back replacement characters at its end, which may be the
    first bytes of a character.
    """

    _MAX_TOKENS = 64
    _KEPT_TOKENS = 24

    def __init__(self, tokenizer: tokenizers.Tokenizer, pieces: TokenPieces) -> None:
        self._tokenizer = tokenizer
        self._pieces = pieces
        self._window: list[int] = []
        self._num_emitted = 0  # characters of the window's text

    def push(self, ids: Sequence[int]) -> bytes:
        for token_id in ids:
            if token_id not in self._pieces.later:
                raise unknown_id(token_id)
        self._window.extend(ids)
        text = self._tokenizer.decode(self._window)
        delta = self._emit(text.rstrip(_REPLACEMENT))
        if len(self._window) > self._MAX_TOKENS and self._num_emitted == len(text):
            self._move(text)
        return delta

    def finish(self) -> bytes:
        return self._emit(self._tokenizer.decode(self._window))

    def _emit(self, text: str) -> bytes:
        delta = text[self._num_emitted :]
        self._num_emitted += len(delta)
        return delta.encode()

    def _move(self, text: str) -> None:
        kept = self._window[-self._KEPT_TOKENS :]
        kept_text = self._tokenizer.decode(kept)
        if kept_text and text.endswith(kept_text):
            self._window, self._num_emitted = kept, len(kept_text)


def unknown_id(token_id: object) -> TokenizerError:
    return TokenizerError(f"token id {token_id} is not in the tokenizer's vocabulary; use ids that it lists")
