"""Beam search against transformers' on the same weights, and against every continuation there is."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers

from model.beam_search import BeamParams, beam_search
from model.checkpoint import load_model
from model.config import gpt2_config
from model.errors import InvalidSamplingParamsError
from model.generate import PromptError, generate
from model.sampling_params import SamplingParams
from model.transformer import Transformer

EOS = 3
_GPT2 = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
_LLAMA = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40,
}  # fmt: skip
PROMPTS = ([7], [3, 1, 4, 1, 5, 9, 2, 6], list(range(20, 37)))


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Transformer]:
    config: Any = (
        transformers.GPT2Config(**_GPT2, bos_token_id=EOS, eos_token_id=EOS)
        if request.param == "gpt2"
        else transformers.LlamaConfig(**_LLAMA, bos_token_id=EOS, eos_token_id=EOS)
    )
    torch.manual_seed(11)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
        theirs.get_output_embeddings().weight[EOS] *= 2.0  # an end that is sometimes likely
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, load_model(folder, dtype=torch.float32)


_HF_STOPPING: dict[str, object] = {"off": False, "first": True, "never": "never"}


@pytest.mark.parametrize("early_stopping", ["off", "first", "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -1.0, 2.0])
@pytest.mark.parametrize("num_beams", [2, 5])
def test_hypotheses_equal_transformers(
    models: tuple[Any, Transformer], num_beams: int, length_penalty: float, early_stopping: Any
) -> None:
    theirs, ours = models
    for prompt in PROMPTS:
        expected = theirs.generate(
            torch.tensor([prompt]), num_beams=num_beams, num_return_sequences=num_beams, do_sample=False,
            max_new_tokens=12, length_penalty=length_penalty, early_stopping=_HF_STOPPING[early_stopping],
            pad_token_id=EOS, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        params = BeamParams(
            num_beams=num_beams, max_tokens=12, length_penalty=length_penalty, early_stopping=early_stopping
        )
        found = beam_search(ours, prompt, params)
        width = expected.sequences.shape[1] - len(prompt)
        padded = [[*h.token_ids, *[EOS] * (width - len(h.token_ids))] for h in found]
        assert padded == expected.sequences[:, len(prompt) :].tolist()
        assert [h.score for h in found] == pytest.approx(expected.sequences_scores.tolist(), rel=1e-4)
        for hypothesis in found:
            assert (hypothesis.finish_reason == "stop") == (hypothesis.token_ids[-1] == EOS)


def test_the_comparison_sees_both_ends(models: tuple[Any, Transformer]) -> None:
    _, ours = models
    found = [h for prompt in PROMPTS for h in beam_search(ours, prompt, BeamParams(num_beams=5, max_tokens=12))]
    assert {h.finish_reason for h in found} == {"stop", "length"}


def tiny_model() -> Transformer:
    model = Transformer(gpt2_config(1, 2, 16, vocab_size=5, max_seq_len=8)).eval()
    model.init_weights(seed=1)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(30.0)
    return model


def test_enough_beams_find_the_most_likely_continuation_of_all() -> None:
    model, prompt, length = tiny_model(), [1, 2], 3

    def logprob(continuation: tuple[int, ...]) -> float:
        ids = torch.tensor([[*prompt, *continuation]])
        rows = model.compute_logits(model(ids)).log_softmax(-1)[0, len(prompt) - 1 : -1]
        return rows[range(length), list(continuation)].sum().item()

    with torch.no_grad():
        ranked = sorted(((logprob(c), c) for c in itertools.product(range(5), repeat=length)), reverse=True)
    params = BeamParams(num_beams=25, max_tokens=length, ignore_eos=True, length_penalty=0.0)
    found = beam_search(model, prompt, params)
    assert [tuple(h.token_ids) for h in found[:3]] == [c for _, c in ranked[:3]]
    assert [h.logprob for h in found[:3]] == pytest.approx([total for total, _ in ranked[:3]], abs=1e-4)


def test_one_beam_is_greedy() -> None:
    model = tiny_model()
    [found] = beam_search(model, [1], BeamParams(num_beams=1, max_tokens=6, ignore_eos=True))
    greedy = generate(model, [1], SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True))
    assert found.token_ids == greedy.token_ids


def test_ends_limits_and_padding() -> None:
    model = tiny_model()
    barred = beam_search(model, [1], BeamParams(num_beams=3, max_tokens=5, min_tokens=4, stop_token_ids=(0, 2)),
                         eos_token_ids=[3])  # fmt: skip
    assert all(len(h.token_ids) >= 4 and not {0, 2, 3} & set(h.token_ids[:3]) for h in barred)
    context = beam_search(model, [1] * 6, BeamParams(num_beams=2, ignore_eos=True))
    assert [len(h.token_ids) for h in context] == [2, 2]
    valid = beam_search(model, [1], BeamParams(num_beams=4, max_tokens=4, ignore_eos=True), valid_vocab_size=2)
    assert {token_id for h in valid for token_id in h.token_ids} <= {0, 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_beams": 0}, "num_beams must lie between 1 and 64"),
        ({"num_beams": 65}, "num_beams must lie"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens must lie between 0 and max_tokens"),
        ({"length_penalty": float("nan")}, "length_penalty must lie"),
        ({"early_stopping": "soon"}, "early_stopping must be off, first or never"),
    ],
)
def test_parameters_out_of_bounds_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSamplingParamsError, match=message):
        BeamParams(**change)


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    with pytest.raises(PromptError, match="8 tokens and must leave room"):
        beam_search(tiny_model(), [1] * 8, BeamParams())
