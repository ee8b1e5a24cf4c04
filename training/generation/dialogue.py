"""What the model is given at each turn of `generate --interactive`, and what of it is cut when the context is full.

Both dialogues leave room for `reserve` tokens of the answer, or for half the context if that is less. Free of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from model.chat_template import ChatTemplate, render_chat
from model.tokenizer import Tokenizer
from training.errors import RecipeError
from training.generation.prompts import prompt_ids

Message = dict[str, str]


class Dialogue(Protocol):
    """Turns of a user and the model. A question counts once it is answered."""

    def ask(self, text: str, reserve: int) -> list[int]:
        """The ids to continue. Raises RecipeError or TokenizerError for what cannot be asked."""
        ...

    def answered(self, text: str, token_ids: Sequence[int]) -> None:
        """What the model wrote to the last question, all or part of it."""
        ...

    def reset(self) -> None:
        """Forget all turns."""
        ...


class Completion:
    """Each line is a prompt of its own; an empty line goes on with the last text."""

    def __init__(self, tokenizer: Tokenizer, max_seq_len: int, prefix: Sequence[int] = ()) -> None:
        self._tokenizer, self._max_seq_len, self._prefix = tokenizer, max_seq_len, list(prefix)
        self._asked: list[int] = []
        self._text: list[int] = []

    def ask(self, text: str, reserve: int) -> list[int]:
        goes_on = not text and bool(self._text)
        self._asked = self._text if goes_on else prompt_ids(self._tokenizer, text, self._prefix)
        room = _room(self._max_seq_len, reserve)
        if len(self._asked) <= room:
            return self._asked
        kept = self._prefix if self._asked[: len(self._prefix)] == self._prefix else []
        return [*kept, *self._asked[len(self._asked) - max(1, room - len(kept)) :]]

    def answered(self, text: str, token_ids: Sequence[int]) -> None:
        self._text = [*self._asked, *token_ids]

    def reset(self) -> None:
        self._text = []


class Chat:
    """Messages in the form of the checkpoint's template; the oldest turns go when the context is full."""

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, max_seq_len: int, system: str | None = None
    ) -> None:
        self._tokenizer, self._template, self._max_seq_len = tokenizer, template, max_seq_len
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[tuple[Message, Message]] = []
        self._question: Message = {}

    @property
    def num_turns(self) -> int:
        return len(self._turns)

    def ask(self, text: str, reserve: int) -> list[int]:
        if not text:
            raise RecipeError("an empty message cannot be answered; write something, or /help")
        self._question = {"role": "user", "content": text}
        ids, room = self._ids(), _room(self._max_seq_len, reserve)
        while len(ids) > room and self._turns:
            del self._turns[0]
            ids = self._ids()
        if len(ids) >= self._max_seq_len:
            raise RecipeError(
                f"the message has {len(ids)} tokens and must leave room in the context of {self._max_seq_len}; "
                "shorten it"
            )
        return ids

    def answered(self, text: str, token_ids: Sequence[int]) -> None:
        self._turns.append((self._question, {"role": "assistant", "content": text}))

    def reset(self) -> None:
        self._turns.clear()

    def _ids(self) -> list[int]:
        turns = [message for turn in self._turns for message in turn]
        messages = [*self._system, *turns, self._question]
        text = render_chat(self._template, messages, forbidden=self._tokenizer.special_tokens)
        return self._tokenizer.encode_template(text)


def _room(max_seq_len: int, reserve: int) -> int:
    """Tokens that a prompt may have."""
    return max(1, max_seq_len - min(reserve, max_seq_len // 2))
