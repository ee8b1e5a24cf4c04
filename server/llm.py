"""The engine as a Python object: text from prompts in this process, without a server.

    from server.llm import LLM, GenerationParams

    with LLM("openai-community/gpt2") as llm:
        for output in llm.generate(["The quill", "Once upon"], GenerationParams(max_tokens=40, stop="\\n")):
            print(output.text)

The tokens are those of the server for the same parameters and seed. It sets torch's number of threads, and cannot set
what acts before Python starts; `server.engine.environment` says what the server's own engine process is started with.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from model.chat_template import ChatTemplate, load_chat_template, render_chat
from model.errors import InvalidSamplingParamsError
from model.hub import HubName, resolve_model
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from server.engine.config import EngineConfig
from server.engine.messages import AddRequest, EngineInfo
from server.llm_types import Completion, GenerationParams, LLMError, Output
from server.output import ChoiceDelta, ChoiceOutput, join_deltas
from server.seeds import choice_seed

if TYPE_CHECKING:
    from server.engine.llm_engine import LLMEngine

__all__ = ["LLM", "Completion", "GenerationParams", "LLMError", "Output", "SamplingParams"]

TextPrompt = str | Sequence[int]
Message = Mapping[str, object]
_OPTIONS = tuple(
    field.name for field in dataclasses.fields(EngineConfig) if field.name not in ("model_path", "model_name")
)


@dataclass(slots=True)
class _Choice:
    """One sequence in the engine; `deltas` are those that nobody has taken yet."""

    output: ChoiceOutput
    seed: int
    deltas: deque[ChoiceDelta]


@dataclass(frozen=True, slots=True)
class _Request:
    prompt: str | None
    token_ids: list[int]
    params: GenerationParams


class LLM:
    """One model and its engine; for one thread at a time.

    `model` is a folder or, as a string, a model's name, of which `revision` is a branch, a tag or a commit. Options are
    the fields of `server.engine.config.EngineConfig`: device, dtype, quantization, kv_cache_memory in bytes …
    Raises LLMError for an unknown option, and what loading raises: HubError, ConfigError, CheckpointError and
    TokenizerError.
    """

    def __init__(self, model: str | Path, *, revision: str | None = None, **options: Any) -> None:
        config = _config(model, revision, options)
        folder = Path(config.model_path)
        self.tokenizer = Tokenizer.load(folder)
        self._chat_template: ChatTemplate | None = load_chat_template(folder)
        from server.engine.llm_engine import LLMEngine

        self._engine: LLMEngine | None = LLMEngine(config)
        self.info: EngineInfo = self._engine.info
        self._ids = itertools.count()
        self._live: dict[int, _Choice] = {}

    def generate(
        self,
        prompts: TextPrompt | Sequence[TextPrompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Output]:
        """An output for each prompt, in order; all of them share the engine's steps.

        A prompt is a text or a list of token ids. `params` is for all prompts or one for each (GenerationParams has n
        and stop strings too). What does not fit the model's context ends there, with finish_reason length.
        Raises LLMError, TokenizerError, InvalidSamplingParamsError or GrammarError, before anything runs, for what
        cannot be run.
        """
        listed = _as_list(prompts)
        requests = [self._request(*pair) for pair in zip(listed, _params_for(listed, params), strict=True)]
        started: list[dict[int, _Choice]] = []
        try:
            for request in requests:
                started.append(self._start(request))
            for choices in started:
                while not choices.keys().isdisjoint(self._live):
                    self._step()
        finally:
            for choices in started:
                self._abort(choices)
        return [_output(request, choices) for request, choices in zip(requests, started, strict=True)]

    def stream(self, prompt: TextPrompt, params: SamplingParams | None = None) -> Iterator[ChoiceDelta]:
        """The deltas of a prompt's choices as they come; joined, they are what `generate` gives.

        Other calls may run between two of them. Leaving the loop ends the sequences. Raises as `generate` does.
        """
        return self._stream(self._request(prompt, params or GenerationParams()))

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Output:
        """The assistant's next turn. Raises as `chat_token_ids` and `generate` do."""
        return self.generate([self.chat_token_ids(messages)], params)[0]

    def chat_token_ids(self, messages: Sequence[Message]) -> list[int]:
        """A conversation as a prompt of ids, by the checkpoint's template.

        Raises LLMError without a template, TokenizerError for messages that it refuses.
        """
        if self._chat_template is None:
            raise LLMError("the model has no chat template; give generate() a prompt")
        text = render_chat(self._chat_template, messages, forbidden=self.tokenizer.special_tokens)
        return self.tokenizer.encode_template(text)

    def close(self) -> None:
        """Let go of the model and its memory; harmless when called twice."""
        self._live.clear()
        self._engine = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _open_engine(self) -> LLMEngine:
        if self._engine is None:
            raise LLMError("this LLM has been closed; make another")
        return self._engine

    def _request(self, prompt: TextPrompt, params: SamplingParams) -> _Request:
        values = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
        request = _Request(
            prompt if isinstance(prompt, str) else None,
            self._token_ids(prompt),
            params if isinstance(params, GenerationParams) else GenerationParams(**values),
        )
        self._check(request)
        return request

    def _token_ids(self, prompt: TextPrompt) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        token_ids = self.tokenizer.encode(prompt)
        if not token_ids and self.tokenizer.start_token_id is not None:
            return [self.tokenizer.start_token_id]
        return token_ids

    def _check(self, request: _Request) -> None:
        """What the sequence and the sampler would stumble over later, after others have begun."""
        width, context = self._open_engine.runner.model_config.vocab_size, self.info.max_model_len
        if not 1 <= len(request.token_ids) < context:
            raise LLMError(
                f"a prompt has {len(request.token_ids)} tokens; the model takes 1 to {context - 1}, so change it"
            )
        if request.params.max_tokens < 1:
            raise InvalidSamplingParamsError("max_tokens", "must be at least 1")
        if request.params.grammar is not None:
            self._open_engine.runner.grammars.check(request.params.grammar)
        for name, ids in (
            ("prompt", request.token_ids),
            ("stop_token_ids", request.params.stop_token_ids),
            ("logit_bias", request.params.logit_bias),
        ):
            if any(not 0 <= token_id < width for token_id in ids):
                raise LLMError(f"{name} holds a token id outside 0 … {width - 1}")

    def _start(self, request: _Request) -> dict[int, _Choice]:
        """Its choices, in the engine."""
        choices: dict[int, _Choice] = {}
        for index in range(request.params.n):
            seed = choice_seed(request.params.seed, index)
            output = ChoiceOutput(index, self.tokenizer, request.params.stops, request.params.min_tokens)
            request_id = next(self._ids)
            params = replace(request.params, seed=seed)
            self._open_engine.add(AddRequest(request_id, request.token_ids, params, time.monotonic()))
            choices[request_id] = self._live[request_id] = _Choice(output, seed, deque())
        return choices

    def _stream(self, request: _Request) -> Iterator[ChoiceDelta]:
        choices = self._start(request)
        try:
            while True:
                is_over = choices.keys().isdisjoint(self._live)
                for choice in choices.values():
                    while choice.deltas:
                        yield choice.deltas.popleft()
                if is_over:
                    return
                self._step()
        finally:
            self._abort(choices)

    def _step(self) -> None:
        """One step of the engine, for all that is in it."""
        engine = self._open_engine
        for output in engine.step().outputs:
            choice = self._live.get(output.request_id)
            if choice is None:
                continue
            delta = choice.output.push(output)
            choice.deltas.append(delta)
            if delta.finish_reason is not None:
                del self._live[output.request_id]
                engine.abort(output.request_id)  # after a stop string the engine would go on

    def _abort(self, choices: Mapping[int, _Choice]) -> None:
        for request_id in choices:
            if self._live.pop(request_id, None) is not None and self._engine is not None:
                self._engine.abort(request_id)


def _config(model: str | Path, revision: str | None, options: Mapping[str, Any]) -> EngineConfig:
    unknown = sorted(options.keys() - set(_OPTIONS))
    if unknown:
        raise LLMError(f"{unknown[0]} is no option of LLM; they are {', '.join(_OPTIONS)}")
    folder = resolve_model(model, revision)
    name = HubName.parse(str(model))
    shown = folder.resolve().name if name is None or folder == Path(model) else name.repo
    return EngineConfig(model_path=str(folder), model_name=shown, **options)


def _as_list(prompts: TextPrompt | Sequence[TextPrompt]) -> list[TextPrompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]  # the first of its ids says what it is
    return list(prompts)  # type: ignore[arg-type]


def _params_for(
    prompts: Sequence[TextPrompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or GenerationParams()] * len(prompts)
    if len(params) != len(prompts):
        raise LLMError(
            f"params has {len(params)} entries for {len(prompts)} prompts; give one for each, or one for all"
        )
    return params


def _output(request: _Request, choices: Mapping[int, _Choice]) -> Output:
    return Output(request.prompt, request.token_ids, [_completion(choice) for choice in choices.values()])


def _completion(choice: _Choice) -> Completion:
    whole = join_deltas(list(choice.deltas))
    assert whole.finish_reason is not None, "the engine has ended the sequence"
    return Completion(whole.text, whole.token_ids, whole.finish_reason, whole.stop_reason, choice.seed, whole.logprobs)
