"""generate() against transformers' greedy search, and its ends, streams and errors on a scripted model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from model.checkpoint import load_model
from model.config import gpt2_config
from model.dense_cache import DenseKVCache
from model.errors import CheckpointError
from model.generate import GeneratedToken, PromptError, generate, stream_generate
from model.sampling import Sampler, SamplerOutput
from model.sampling_params import SamplingParams

CONFIG = gpt2_config(1, 2, 8, vocab_size=12, max_seq_len=16)
EOS = 11
GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


class Counter:
    """A model whose best next token is the last one plus one, and which notes what it was fed."""

    config = CONFIG
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.fed: list[int] = []

    def __call__(self, input_ids: Tensor, cache: DenseKVCache | None = None) -> Tensor:
        assert input_ids.shape[0] == 1
        self.fed.append(input_ids.shape[1])
        return input_ids

    def compute_logits(self, hidden: Tensor) -> Tensor:
        best = (hidden + 1) % CONFIG.vocab_size
        return torch.nn.functional.one_hot(best, CONFIG.vocab_size).float() * 5

    def new_dense_cache(self, batch_size: int = 1, max_len: int | None = None) -> DenseKVCache:
        return DenseKVCache(CONFIG, batch_size=1, max_len=max_len or 16, dtype=torch.float32, device="cpu")


def test_length_is_max_tokens_and_a_cached_step_feeds_one_token() -> None:
    model = Counter()
    output = generate(model, [0, 1], GREEDY)
    assert (output.token_ids, output.finish_reason, output.logprobs) == ([2, 3, 4, 5, 6, 7], "length", None)
    assert model.fed == [2, 1, 1, 1, 1, 1]


def test_without_cache_the_whole_sequence_is_fed_each_step() -> None:
    model = Counter()
    assert generate(model, [0, 1], GREEDY, use_cache=False).token_ids == [2, 3, 4, 5, 6, 7]
    assert model.fed == [2, 3, 4, 5, 6, 7]


def test_logits_that_are_no_numbers_are_an_error_where_the_sampler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "sample", lambda *args: SamplerOutput(torch.tensor([-1])))
    with pytest.raises(CheckpointError, match="logits are not numbers"):
        generate(Counter(), [0, 1], GREEDY)


def test_eos_of_the_config_stops_and_is_among_the_tokens() -> None:
    output = generate(Counter(), [8], GREEDY)
    assert (output.token_ids, output.finish_reason) == ([9, 10, EOS], "stop")


def test_eos_ids_can_be_given() -> None:
    assert generate(Counter(), [0], GREEDY, eos_token_ids=[3, 2]).token_ids == [1, 2]
    assert generate(Counter(), [8], GREEDY, eos_token_ids=[]).token_ids == [9, 10, 11, 0, 1, 2]


def test_ignore_eos_goes_on_but_stop_tokens_still_stop() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, stop_token_ids=(1,))
    output = generate(Counter(), [9], params)
    assert (output.token_ids, output.finish_reason) == ([10, 11, 0, 1], "stop")


def test_min_tokens_puts_the_end_off() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=6, min_tokens=3, stop_token_ids=(1, 2))
    output = generate(Counter(), [0], params)
    assert (output.token_ids, output.finish_reason) == ([0, 0, 0, 1], "stop")


def test_a_stop_on_the_last_allowed_token_is_a_stop() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=2, stop_token_ids=(2,))
    assert generate(Counter(), [0], params).finish_reason == "stop"


def test_the_context_ends_a_sequence() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    output = generate(Counter(), [0] * 13, params)
    assert (output.token_ids, output.finish_reason) == ([1, 2, 3], "length")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "at least one token"), ([0] * 16, "16 tokens and must leave room"), ([12], "0 to 11"), ([-1], "0 to 11")],
)
def test_prompts_that_cannot_be_continued_are_refused_at_the_call(prompt: list[int], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        stream_generate(Counter(), prompt, GREEDY)


def test_padded_ids_are_never_generated() -> None:
    params = SamplingParams(temperature=2.0, max_tokens=15, ignore_eos=True, seed=4)
    assert max(generate(Counter(), [3], params, valid_vocab_size=5).token_ids) < 5


def test_the_stream_is_what_generate_collects() -> None:
    params = SamplingParams(temperature=1.5, max_tokens=5, seed=3, logprobs=2, ignore_eos=True)
    tokens = list(stream_generate(Counter(), [4], params))
    output = generate(Counter(), [4], params)
    assert [token.token_id for token in tokens] == output.token_ids
    assert [token.logprobs for token in tokens] == output.logprobs
    assert [token.finish_reason for token in tokens] == [None] * 4 + ["length"]


def test_logprobs_hold_the_alternatives_asked_for() -> None:
    [token] = stream_generate(Counter(), [4], SamplingParams(temperature=0.0, max_tokens=1, logprobs=2))
    assert isinstance(token, GeneratedToken)
    assert token.logprobs is not None
    best = torch.log_softmax(torch.tensor([5.0] + [0.0] * 11), dim=0)
    assert [token_id for token_id, _ in token.logprobs.top] == [5, 0]
    assert token.logprobs.logprob == pytest.approx(best[0].item())
    assert [value for _, value in token.logprobs.top] == pytest.approx(best[:2].tolist())


_SMALL_GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_SMALL_LLAMA = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_equals_transformers(family: str, use_cache: bool, tmp_path: Path) -> None:
    config: Any = (
        transformers.GPT2Config(**_SMALL_GPT2, bos_token_id=0, eos_token_id=0)
        if family == "gpt2"
        else transformers.LlamaConfig(**_SMALL_LLAMA, bos_token_id=0, eos_token_id=0)
    )
    torch.manual_seed(5)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # larger weights than at initialisation, for outputs that vary
        for parameter in theirs.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, dtype=torch.float32)
    varied = set()
    for prompt in ([7], [3, 1, 4, 1, 5, 9, 2, 6], list(range(30, 47))):
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0
        )
        params = SamplingParams(temperature=0.0, max_tokens=24, min_tokens=24)
        output = generate(ours, prompt, params, use_cache=use_cache)
        assert output.token_ids == expected[0, len(prompt) :].tolist()
        varied.update(output.token_ids)
    assert len(varied) > 8
