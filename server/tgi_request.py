"""From a body of Text Generation Inference to a generation of ours.

Read beside TGI's last release (router/src/validation.rs and lib.rs, server/utils/tokens.py): the defaults, what turns
sampling on, and what is refused together.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from pydantic import TypeAdapter

from model.grammar import Grammar
from server.admission import chosen_model, start_generation
from server.caller import Caller
from server.errors import InvalidRequestError
from server.generation import Generation
from server.grammars import tgi_grammar
from server.prompts import Prompt, ServedModel, check_grammar, make_prompt
from server.schemas.sampling import SamplingFields
from server.schemas.tgi import TgiParameters, TgiRequest
from server.services import Services
from server.tokenization import encode_text

# TGI samples a body that has no parameters at all, and is greedy where there are parameters that do not ask to sample.
_WITHOUT_PARAMETERS = TgiParameters.model_validate({"do_sample": True})
_JSON: TypeAdapter[object] = TypeAdapter(object)


@dataclass(frozen=True, slots=True)
class TgiGeneration:
    """A request under way. `sampled` is false for greedy text, `received` and `started` are monotonic seconds."""

    inputs: str
    parameters: TgiParameters
    sampled: bool
    model: ServedModel
    generation: Generation
    received: float
    started: float


def is_tgi_body(raw: bytes) -> bool:
    """Whether a JSON body is TGI's, which has `inputs` where ours has `prompt`."""
    if b'"inputs"' not in raw:
        return False
    try:
        body = _JSON.validate_json(raw)
    except ValueError:
        return False  # our own routes say what is wrong with it
    return isinstance(body, dict) and "inputs" in body and "prompt" not in body


async def admit_tgi(body: TgiRequest, services: Services, caller: Caller, *, streamed: bool) -> TgiGeneration:
    """Check the request against the model at hand and hand it to the engine. Raises ApiError."""
    received = time.monotonic()
    parameters = _WITHOUT_PARAMETERS if body.parameters is None else body.parameters
    model = chosen_model(body.model, parameters.seed, services)
    sampled = _is_sampled(parameters)
    _check_parameters(parameters, model, sampled=sampled, streamed=streamed)
    grammar = tgi_grammar(parameters.grammar)
    await check_grammar(grammar, "grammar", model)
    token_ids = await encode_text(body.inputs, "inputs", model.tokenizer)
    prompt = _prompt(
        token_ids, parameters, model, sampled=sampled, streamed=streamed, arrival=received, grammar=grammar
    )
    started = time.monotonic()
    generation = start_generation([prompt], services, caller)
    return TgiGeneration(body.inputs, parameters, sampled, model, generation, received, started)


def _is_sampled(parameters: TgiParameters) -> bool:
    """A temperature of 1 asks for nothing by itself: TGI's server sees no difference from none."""
    given = (parameters.top_k, parameters.top_p)
    warm = parameters.temperature is not None and parameters.temperature != 1.0
    return bool(parameters.do_sample) or warm or any(value is not None for value in given)


def _check_parameters(parameters: TgiParameters, model: ServedModel, *, sampled: bool, streamed: bool) -> None:
    for name, reason in (
        ("watermark", "Quill does not mark its texts"),
        ("adapter_id", "Quill loads no adapters; merge them into the model"),
        ("typical_p", "Quill has no typical sampling; use top_p or min_p of POST /generate"),
    ):
        if getattr(parameters, name):
            raise InvalidRequestError(f"{name} must be left out: {reason}", param=name)
    best_of = parameters.best_of or 1
    if best_of > 1 and streamed:
        raise InvalidRequestError("best_of must be 1 or left out of a stream", param="best_of")
    if best_of > 1 and not sampled:
        raise InvalidRequestError("best_of above 1 needs sampling: set do_sample", param="best_of")
    if best_of > model.max_sequences:
        raise InvalidRequestError(f"best_of must not be above {model.max_sequences}", param="best_of")
    if parameters.decoder_input_details and streamed:
        message = "decoder_input_details must be left out of a stream"
        raise InvalidRequestError(message, param="decoder_input_details")
    if parameters.truncate is not None and parameters.truncate >= model.max_model_len:
        message = f"truncate must be below {model.max_model_len}, the model's context in tokens"
        raise InvalidRequestError(message, param="truncate")


def _prompt(
    token_ids: list[int], parameters: TgiParameters, model: ServedModel, *,
    sampled: bool, streamed: bool, arrival: float, grammar: Grammar | None,
) -> Prompt:  # fmt: skip
    if parameters.truncate is not None:
        token_ids = token_ids[-parameters.truncate :]
    values = {
        "temperature": (parameters.temperature or 1.0) if sampled else 0.0,
        "top_k": min(parameters.top_k or 0, model.output_width),
        "top_p": parameters.top_p or 1.0,
        "repetition_penalty": parameters.repetition_penalty or 1.0,
        "frequency_penalty": parameters.frequency_penalty or 0.0,
        "seed": parameters.seed,
        "stop": parameters.stop,
        "n": parameters.best_of or 1,
    }
    return make_prompt(
        token_ids, SamplingFields.model_validate(values), parameters.max_new_tokens, model,
        arrival=arrival, logprobs=_num_logprobs(parameters, streamed), grammar=grammar,
        prompt_logprobs=0 if parameters.decoder_input_details else None,
        prompt_field="inputs", max_tokens_field="max_new_tokens",
    )  # fmt: skip


def _num_logprobs(parameters: TgiParameters, streamed: bool) -> int | None:
    """Every token that is shown has its log-probability; choosing the best sequence needs them too."""
    shown = streamed or parameters.details or parameters.decoder_input_details or (parameters.best_of or 1) > 1
    return parameters.top_n_tokens or 0 if shown else None
