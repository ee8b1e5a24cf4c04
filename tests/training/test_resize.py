"""New rows of the vocabulary: transformers' mean resizing, and the bound that the mean gives, say where they start."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from model.resize import resize_vocabulary


def weights(rows: int = 40, width: int = 16, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ("embed_tokens.weight", "lm_head.weight")
    state = {name: torch.empty(rows, width).normal_(0.3, 0.7, generator=generator) for name in names}
    return state | {"final_norm.weight": torch.ones(width)}


@pytest.mark.parametrize("tied", [True, False])
def test_known_rows_stay_and_new_ones_start_near_their_mean(tied: bool) -> None:
    state = weights()
    if tied:
        del state["lm_head.weight"]
    before = {name: tensor.clone() for name, tensor in state.items()}
    after = resize_vocabulary(state, 30, 64, seed=1)
    assert state.keys() == after.keys()
    assert all(torch.equal(state[name], before[name]) for name in state)
    assert torch.equal(after["final_norm.weight"], before["final_norm.weight"])
    for name in after.keys() - {"final_norm.weight"}:
        assert after[name].shape == (64, 16)
        assert torch.equal(after[name][:30], before[name][:30])
        added = after[name][30:]  # rows 30 to 39 were padding
        spread, mean = torch.std_mean(before[name][:30], dim=0, correction=0)
        noise = (added - mean) / spread
        assert 0.008 < noise.std().item() < 0.012  # 34 * 16 draws of 0.01
        assert noise.abs().max().item() < 0.05
        assert len(torch.unique(added, dim=0)) == 34


def test_the_seed_decides_the_noise() -> None:
    first, again, other = (resize_vocabulary(weights(), 40, 50, seed) for seed in (1, 1, 2))
    assert torch.equal(first["lm_head.weight"], again["lm_head.weight"])
    assert not torch.equal(first["lm_head.weight"][40:], other["lm_head.weight"][40:])
    assert not torch.equal(first["lm_head.weight"][40:], first["embed_tokens.weight"][40:])


def test_without_new_rows_nothing_changes() -> None:
    state = weights()
    same = resize_vocabulary(state, 40, 40, seed=1)
    assert all(torch.equal(same[name], state[name]) for name in state)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_puts_new_rows_at_the_same_place(tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied, pad_token_id=None, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(4)
    theirs = LlamaForCausalLM(config)
    state = {"embed_tokens.weight": theirs.get_input_embeddings().weight.detach().clone()}
    if not tied:
        state["lm_head.weight"] = theirs.get_output_embeddings().weight.detach().clone()
    ours = resize_vocabulary(state, 60, 66, seed=0)
    theirs.resize_token_embeddings(66, mean_resizing=True)
    for name, layer in (
        ("embed_tokens.weight", theirs.get_input_embeddings()), ("lm_head.weight", theirs.get_output_embeddings())
    ):  # fmt: skip
        if name in ours:
            expected = layer.weight.detach()
            assert torch.equal(ours[name][:60], expected[:60])
            spread = expected[:60].std(dim=0)
            assert ((ours[name][60:] - expected[60:]).abs() < 0.05 * spread + 1e-3).all()


@settings(deadline=None)
@given(st.integers(0, 1_000), st.integers(1, 20))
def test_the_model_goes_on_saying_what_it_said(seed: int, added: int) -> None:
    """At the mean a new token's probability is at most 1/(known + 1) by Jensen's inequality, so that all of them cost
    the old text at most ln(1 + added/known) nats a token; the noise adds its own small factor."""
    known, generator = 50, torch.Generator().manual_seed(seed)
    head = torch.randn(known, 8, generator=generator)
    hidden = 3.0 * torch.randn(32, 8, generator=generator)
    resized = resize_vocabulary({"embed_tokens.weight": head}, known, known + added, seed)["embed_tokens.weight"]
    before, after = (torch.logsumexp(hidden @ weight.T, dim=-1) for weight in (head, resized))
    loss = (after - before).max().item()
    assert 0 < loss < math.log(1 + added / known * math.exp(0.01 * 6 * hidden.norm(dim=-1).max().item()))
