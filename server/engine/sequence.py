"""Sequence: all that the engine knows of one request's choice, as plain Python values."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Literal

from model.errors import QuillError
from model.sampling_params import MAX_LOGPROBS, SamplingParams
from server.engine.speculation import PromptLookup

if TYPE_CHECKING:
    from server.engine.block_manager import BlockContent
    from server.engine.grammar_matcher import GrammarMatcher
    from server.engine.messages import Explain, RequestTrace

FinishReason = Literal["stop", "length", "deadline", "abort", "error", "grammar"]


class InvalidSequenceError(QuillError):
    """A sequence that the engine cannot run; its one sentence names the field."""


class PromptScore:
    """Which log-probabilities of a prompt are still to be computed.

    The model's output after the prompt's token p (row p) tells that of `targets[p]`, the token behind it. `next_row`
    only grows: what has been computed is not asked for again after a preemption. `num_top` is how many alternatives
    are wanted for each token.
    """

    __slots__ = ("next_row", "num_top", "targets")

    def __init__(self, prompt_token_ids: list[int], num_top: int, first_token: int) -> None:
        self.targets = prompt_token_ids[1:]
        self.num_top = num_top
        self.next_row = first_token - 1

    @property
    def is_complete(self) -> bool:
        return self.next_row >= len(self.targets)

    def rows(self, start: int, count: int) -> range:
        """Those of the rows [start, start + count) that are wanted."""
        return range(max(start, self.next_row), min(start + count, len(self.targets)))

    def take(self, start: int, count: int) -> bool:
        """Count these rows as computed; whether any of them was wanted."""
        rows = self.rows(start, count)
        self.next_row = max(self.next_row, rows.stop)
        return bool(rows)


class SequenceStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One prompt and what has been generated from it.

    `token_ids` is prompt and output in one list, to which only the scheduler appends.
    `num_computed_tokens` counts the leading tokens whose KV is written; `num_scheduled_tokens` those that the
    current step computes next. `block_table[i]` is the block that holds positions `i * block_size` and on.
    `num_pending` tokens, at most two, were drawn behind `token_ids` by steps whose results are still on the device; the
    last of them is entry `pending_row` of what its step draws.
    `cached_tokens` counts prompt tokens that the prefix cache served when the sequence was first admitted.
    `draft` holds guesses at the tokens after the last one, computed in the current step only; `lookup` makes them.
    `generation` names the weights that compute it: those of one of several models, or a model's before a reload.
    `grammar` follows the generated tokens where they are to be of a language, and no tokens are guessed then. Where its
    end ends the sequence, `keeps_last` says that the last token is text like the others.
    `deadline` and the timings are seconds on the scheduler's clock; a timing is 0.0 until it is known.

    `pool` says whose turn it uses while it waits: see server/engine/fair_queue.py. `explain`, with `prompt_logprobs`
    and `max_tokens` 0, asks for more about the tokens that are scored. `trace`, where it is kept, counts its steps.

    `prompt_logprobs` asks for the log-probabilities of the prompt's tokens from `prompt_logprobs_start` on, each with
    that many alternatives. With `max_tokens` 0 nothing else is wanted: the prompt's last token is then only predicted,
    not computed, and is not among `token_ids`.

    Raises InvalidSequenceError if the prompt is empty, leaves no room for a token in `max_model_len`, or for numbers
    out of their bounds.
    """

    __slots__ = (
        "arrival_time", "block_contents", "block_table", "cache_epoch", "cached_tokens", "deadline", "draft",
        "eos_token_ids", "explain", "finish_reason", "finished", "first_scheduled", "first_token", "generation",
        "grammar", "keeps_last", "lookup", "max_num_tokens", "next_cache_boundary", "num_cached_blocks",
        "num_computed_tokens", "num_pending", "num_preemptions", "num_prompt_tokens", "num_scheduled_tokens", "params",
        "pending_row", "pool", "prompt_score", "request_id", "score_only", "status", "stop_ids", "stop_token_id",
        "token_ids", "trace",
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
        prompt_logprobs: int | None = None,
        prompt_logprobs_start: int = 1,
        generation: int = 0,
    ) -> None:
        self.generation = generation
        self.score_only = params.max_tokens == 0
        self.prompt_score: PromptScore | None = None
        if prompt_logprobs is not None:
            _check_prompt_logprobs(prompt_logprobs, prompt_logprobs_start)
            self.prompt_score = PromptScore(prompt_token_ids, prompt_logprobs, prompt_logprobs_start)
        elif self.score_only:
            raise InvalidSequenceError("max_tokens must be at least 1 where no prompt_logprobs are asked for")
        _check_length(len(prompt_token_ids), max_model_len, score_only=self.score_only)
        self.request_id = request_id
        self.token_ids = list(prompt_token_ids)
        if self.score_only and len(prompt_token_ids) > 1:
            self.token_ids.pop()
        self.params = params
        self.pool = 0
        self.explain: Explain | None = None
        self.trace: RequestTrace | None = None
        self.arrival_time = arrival_time
        self.deadline = deadline
        self.num_prompt_tokens = len(self.token_ids)
        # Both length limits in one number, so that a step compares once.
        self.max_num_tokens = min(self.num_prompt_tokens + params.max_tokens, max_model_len)
        self.eos_token_ids = frozenset(() if params.ignore_eos else eos_token_ids)
        self.stop_ids = self.eos_token_ids | frozenset(params.stop_token_ids)

        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_token_id: int | None = None
        self.num_computed_tokens = 0
        self.num_scheduled_tokens = 0
        self.num_pending = 0
        self.pending_row = -1
        self.cached_tokens = 0
        self.first_scheduled = 0.0
        self.first_token = 0.0
        self.finished = 0.0
        self.num_preemptions = 0
        self.draft: list[int] = []
        # Penalties count the tokens before each position, which only one draw at a time can know.
        self.lookup = None if params.has_penalties or params.grammar is not None else PromptLookup()
        self.grammar: GrammarMatcher | None = None
        self.keeps_last = False

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
    def is_drawn_out(self) -> bool:
        """Whether the tokens that are still on the device bring it to its length limit."""
        return self.num_pending > 0 and len(self.token_ids) + self.num_pending >= self.max_num_tokens

    @property
    def waits_for_tokens(self) -> bool:
        """Whether a step can only be prepared when the values of all tokens before it are known to the host."""
        score = self.prompt_score
        return (
            self.grammar is not None
            or self.params.has_penalties
            or bool(self.draft)
            or (score is not None and not score.is_complete)
            or self.score_only
        )

    @property
    def num_reusable_tokens(self) -> int:
        """How many leading tokens others may have computed: one at least is left for the model to give logits of,
        and so is every row whose log-probabilities are wanted."""
        rest, score = len(self.token_ids) - 1, self.prompt_score
        return rest if score is None or score.is_complete else min(rest, score.next_row)

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def check_stop(self) -> FinishReason | None:
        """Why the last token ends the sequence, or None. Sets `stop_token_id`, which stays None for EOS.

        A stop outranks the length limit, and so does the end of a grammar. `min_tokens` needs no look here: the sampler
        masks stop tokens until then.
        """
        token_id = self.token_ids[-1]
        if token_id in self.stop_ids:
            self.stop_token_id = None if token_id in self.eos_token_ids else token_id
            return "stop"
        if self.grammar is not None:
            self.grammar.accept(token_id)
            if self.grammar.has_failed:
                return "grammar"
            if self.grammar.is_complete:
                self.keeps_last = True
                return "stop"
        return "length" if len(self.token_ids) >= self.max_num_tokens else None

    @property
    def failure(self) -> FinishReason:
        """Why no token could be drawn."""
        return "grammar" if self.grammar is not None and self.grammar.has_failed else "error"

    def end(self, finish_reason: FinishReason, now: float) -> None:
        """It has no seat and no blocks any more."""
        self.num_scheduled_tokens = 0
        self.status = SequenceStatus.FINISHED
        self.finish_reason = finish_reason
        self.finished = now

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request_id}, {self.status.value}, prompt={self.num_prompt_tokens},"
            f" tokens={self.num_tokens}, computed={self.num_computed_tokens})"
        )


def _check_prompt_logprobs(num_top: int, start: int) -> None:
    if not 0 <= num_top <= MAX_LOGPROBS:
        raise InvalidSequenceError(f"prompt_logprobs must lie between 0 and {MAX_LOGPROBS}")
    if start < 1:
        raise InvalidSequenceError("prompt_logprobs_start must be at least 1: nothing tells of the first token")


def _check_length(prompt_length: int, max_model_len: int, *, score_only: bool) -> None:
    if not prompt_length:
        raise InvalidSequenceError("prompt must hold at least one token")
    if prompt_length <= max_model_len - 1 + 2 * score_only:
        return
    problem = (
        f"does not fit the context of {max_model_len} and one more"
        if score_only
        else (f"leaves no room in the context of {max_model_len}")
    )
    raise InvalidSequenceError(f"prompt has {prompt_length} tokens, which {problem}: shorten it")
