"""Many sequences at once are, token for token, the sequences alone; generate() is the oracle."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from model.config import ModelConfig, gpt2_config, llama_config
from model.errors import InvalidSamplingParamsError
from model.generate import CausalModel, PromptError, generate
from model.generate_batch import MAX_PROMPT_TOKENS, BatchGenerator, generate_batch
from model.packed_model import pack_model
from model.sampling_params import SamplingParams
from model.transformer import Transformer

VOCAB = 61
CONFIGS: dict[str, ModelConfig] = {
    "gpt2": replace(gpt2_config(2, 2, 32, vocab_size=VOCAB, max_seq_len=48), eos_token_id=5),
    "llama": replace(llama_config(2, 4, 2, 32, 64, vocab_size=VOCAB, max_seq_len=48), eos_token_id=5),
    "windowed": replace(
        llama_config(2, 2, 1, 32, 64, vocab_size=VOCAB, max_seq_len=48),
        architecture="mistral", sliding_window=9, eos_token_id=5,
    ),
}  # fmt: skip


def make_model(config: ModelConfig, *, packed: bool = True) -> CausalModel:
    model = Transformer(config).eval()
    model.init_weights(seed=2)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(8.0)  # clear preferences, so that sequences vary
    return pack_model(model) if packed else model


def mixed_prompts(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of 1 to 40 tokens with every kind of parameter."""
    rng = random.Random(7)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.choice((1, 2, 3, 15, 16, 17, 40)))] for _ in range(count)]
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.2, top_k=9),
        SamplingParams(temperature=0.9, top_p=0.8, repetition_penalty=1.4, presence_penalty=0.3),
        SamplingParams(temperature=1.0, min_p=0.05, frequency_penalty=0.7, min_tokens=3, logprobs=3),
        SamplingParams(temperature=1.5, ignore_eos=True, stop_token_ids=(7, 8), logit_bias={3: 4.0, 9: -50.0}),
    ]
    params = [
        replace(kinds[index % len(kinds)], seed=rng.randrange(2**40), max_tokens=rng.choice((3, 9, 20)))
        for index in range(count)
    ]
    return prompts, params


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_each_sequence_is_what_it_is_alone(family: str) -> None:
    model = make_model(CONFIGS[family])
    prompts, params = mixed_prompts(16)
    alone = [generate(model, p, q, valid_vocab_size=VOCAB - 4) for p, q in zip(prompts, params, strict=True)]
    for max_rows in (5, 64):
        assert generate_batch(model, prompts, params, max_rows=max_rows, valid_vocab_size=VOCAB - 4) == alone
    assert {output.finish_reason for output in alone} == {"stop", "length"}
    assert len({tuple(output.token_ids) for output in alone}) > 8


def test_a_place_that_becomes_free_is_taken_in_the_next_step() -> None:
    model = make_model(CONFIGS["gpt2"])
    lengths = [1, 4, 2, 3]
    params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in lengths]
    generator = BatchGenerator(model, [[1], [2], [3], [4]], params, max_rows=2)
    steps = []
    while not generator.is_done:
        steps.append(sorted(entry.index for entry in generator.step()))
    assert steps == [[0, 1], [1, 2], [1, 2], [1, 3], [3], [3]]
    assert generator.step() == []


def test_a_stopped_sequence_leaves_and_the_others_stay_as_they_are() -> None:
    model = make_model(CONFIGS["llama"])
    params = [SamplingParams(max_tokens=6, ignore_eos=True, seed=seed) for seed in range(4)]
    generator = BatchGenerator(model, [[1], [2, 3], [4], [6]], params, max_rows=3)
    tokens: dict[int, list[int]] = {}
    while not generator.is_done:
        for entry in generator.step():
            tokens.setdefault(entry.index, []).append(entry.token.token_id)
        generator.stop(1)  # running at first, later long gone
        generator.stop(3)  # never begun
    assert {index: len(ids) for index, ids in tokens.items()} == {0: 6, 1: 1, 2: 6}
    assert tokens[2] == generate(model, [4], params[2]).token_ids


def test_long_prompts_are_taken_in_over_several_steps() -> None:
    config = replace(CONFIGS["llama"], max_seq_len=MAX_PROMPT_TOKENS)
    model = make_model(config)
    long = [[1] * (MAX_PROMPT_TOKENS - 50), [2] * 40, [3] * 40]
    generator = BatchGenerator(model, long, [SamplingParams(max_tokens=3, ignore_eos=True)] * 3)
    assert [sorted(entry.index for entry in generator.step()) for _ in range(2)] == [[0, 1], [0, 1, 2]]


def test_what_generate_refuses_is_refused_at_the_start() -> None:
    model = make_model(CONFIGS["gpt2"])
    params = [SamplingParams(), SamplingParams()]
    with pytest.raises(PromptError, match="48 tokens and must leave room"):
        generate_batch(model, [[1], [1] * 48], params)
    with pytest.raises(InvalidSamplingParamsError, match="logit_bias"):
        generate_batch(model, [[1]], [SamplingParams(logit_bias={VOCAB: 1.0})])
    assert generate_batch(model, [], []) == []
