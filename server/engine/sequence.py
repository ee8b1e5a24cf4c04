"""Sequence: all that the engine knows of one request's choice, as plain Python values."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Literal

from model.errors import QuillError
from model.sampling_params import SamplingParams

if TYPE_CHECKING:
    from server.engine.block_manager import BlockContent

FinishReason = Literal["stop", "length", "deadline", "abort", "error"]


class InvalidSequenceError(QuillError):
    """A sequence that the engine cannot run; its one sentence names the field."""


class SequenceStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One prompt and what has been generated from it.

    `token_ids` is prompt and output in one list, to which only the scheduler appends.
    `num_computed_tokens` counts the leading tokens whose KV is written; `num_scheduled_tokens` those that the
    current step computes next. `block_table[i]` is the block that holds positions `i * block_size` and on.
    `cached_tokens` counts prompt tokens that the prefix cache served when the sequence was first admitted.
    `deadline` and the timings are seconds on the scheduler's clock; a timing is 0.0 until it is known.

    Raises InvalidSequenceError if the prompt is empty or leaves no room for a token in `max_model_len`.
    """

    __slots__ = (
        "arrival_time", "block_contents", "block_table", "cache_epoch", "cached_tokens", "deadline", "eos_token_ids",
        "finish_reason", "finished", "first_scheduled", "first_token", "max_num_tokens", "next_cache_boundary",
        "num_cached_blocks", "num_computed_tokens", "num_preemptions", "num_prompt_tokens", "num_scheduled_tokens",
        "params", "request_id", "status", "stop_ids", "stop_token_id", "token_ids",
    )  # fmt: skip

    def __init__(
        self,
        request_id: int,
        prompt_token_ids: list[int],
        params: SamplingParams,
        eos_token_ids: tuple[int, ...],
        max_model_len: int,
        arrival_time: float,
        deadline: float | None = None,
    ) -> None:
        if not prompt_token_ids:
            raise InvalidSequenceError("prompt must hold at least one token")
        if len(prompt_token_ids) >= max_model_len:
            raise InvalidSequenceError(
                f"prompt has {len(prompt_token_ids)} tokens, which leaves no room in the context of {max_model_len}:"
                " shorten it"
            )
        self.request_id = request_id
        self.token_ids = list(prompt_token_ids)
        self.params = params
        self.arrival_time = arrival_time
        self.deadline = deadline
        self.num_prompt_tokens = len(prompt_token_ids)
        # Both length limits in one number, so that a step compares once.
        self.max_num_tokens = min(self.num_prompt_tokens + params.max_tokens, max_model_len)
        self.eos_token_ids = frozenset(() if params.ignore_eos else eos_token_ids)
        self.stop_ids = self.eos_token_ids | frozenset(params.stop_token_ids)

        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_token_id: int | None = None
        self.num_computed_tokens = 0
        self.num_scheduled_tokens = 0
        self.cached_tokens = 0
        self.first_scheduled = 0.0
        self.first_token = 0.0
        self.finished = 0.0
        self.num_preemptions = 0

        # The block manager's part. `block_contents[i]` identifies the i-th full block and outlives a preemption.
        self.block_table: list[int] = []
        self.block_contents: list[BlockContent] = []
        self.num_cached_blocks = 0
        self.next_cache_boundary = 0
        self.cache_epoch = 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def check_stop(self) -> FinishReason | None:
        """Why the last token ends the sequence, or None. Sets `stop_token_id`, which stays None for EOS.

        A stop outranks the length limit. `min_tokens` needs no look here: the sampler masks stop tokens until then.
        """
        token_id = self.token_ids[-1]
        if token_id in self.stop_ids:
            self.stop_token_id = None if token_id in self.eos_token_ids else token_id
            return "stop"
        return "length" if len(self.token_ids) >= self.max_num_tokens else None

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request_id}, {self.status.value}, prompt={self.num_prompt_tokens},"
            f" tokens={self.num_tokens}, computed={self.num_computed_tokens})"
        )
