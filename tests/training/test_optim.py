"""Which optimiser gets which parameter, and its state on the way to a file and back."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig, gpt2_config, llama_config
from model.transformer import Transformer
from training.config import TrainSection
from training.errors import ResumeError
from training.optim import build_optimizers, load_optimizer_tensors, optimizer_tensors, set_learning_rates

VOCAB = 29
Name = Literal["adamw", "muon"]
NAMES: tuple[Name, ...] = ("adamw", "muon")
LLAMA = llama_config(2, 4, 2, 32, 48, max_seq_len=32, vocab_size=VOCAB)
GPT2 = gpt2_config(2, 2, 32, max_seq_len=32, vocab_size=VOCAB)


def new_model(config: ModelConfig = LLAMA) -> Transformer:
    model = Transformer(config)
    model.init_weights(seed=3)
    return model


def section(optimizer: Name = "muon", **changes: Any) -> TrainSection:
    settings: dict[str, Any] = {"dtype": "float32", "lr": 1e-2} | changes
    return TrainSection(optimizer=optimizer, **settings)


def make_words() -> list[Tensor]:
    """Forty words of three to six letters, each with the space (token 0) behind it."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 7, (40,), generator=generator).tolist()
    return [F.pad(torch.randint(1, VOCAB, (length,), generator=generator), (0, 1)) for length in lengths]


WORDS = make_words()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Eight sequences of words in random order: what can be learned is how words go on."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(WORDS), (8, 11), generator=generator).tolist()
    tokens = torch.stack([torch.cat([WORDS[i] for i in row])[:33] for row in chosen])
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(model: Transformer, seed: int) -> Tensor:
    inputs, targets = batch(seed)
    return F.cross_entropy(model.compute_logits(model(inputs)).flatten(0, 1), targets.flatten())


def train(model: Transformer, optimizers: list[torch.optim.Optimizer], steps: range) -> float:
    """The mean loss of the last ten steps."""
    losses = []
    for step in steps:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, seed=step)
        torch.autograd.backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


def members(model: nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_one_optimizer(name: Name, config: ModelConfig) -> None:
    model = new_model(config)
    optimizers = build_optimizers(model, section(name))
    listed = [n for optimizer in optimizers for n in sorted(members(model, optimizer))]
    assert sorted(listed) == sorted(n for n, _ in model.named_parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_muon_gets_the_layers_matrices_and_adamw_the_rest(tied: bool) -> None:
    model = new_model(llama_config(1, 4, 2, 32, 48, max_seq_len=32, vocab_size=VOCAB, tie_word_embeddings=tied))
    muon, adamw = build_optimizers(model, section())
    assert members(model, muon) == {
        "layers.0.attn.qkv_proj.weight", "layers.0.attn.o_proj.weight",
        "layers.0.mlp.gate_up_proj.weight", "layers.0.mlp.down_proj.weight",
    }  # fmt: skip
    assert members(model, adamw) == {
        "embed_tokens.weight", "layers.0.attn_norm.weight", "layers.0.mlp_norm.weight", "final_norm.weight",
        *([] if tied else ["lm_head.weight"]),
    }  # fmt: skip


def test_fused_projections_are_split_into_their_matrices() -> None:
    model = new_model()
    muon = build_optimizers(model, section())[0]
    splits = {
        name.split(".")[-2]: tuple(group["split"])
        for group in muon.param_groups
        for name, parameter in model.named_parameters()
        if any(parameter is p for p in group["params"])
    }
    assert splits == {"qkv_proj": (32, 16, 16), "gate_up_proj": (48, 48), "o_proj": (), "down_proj": ()}


@pytest.mark.parametrize("name", NAMES)
def test_matrices_decay_and_vectors_do_not(name: Name) -> None:
    model = new_model(GPT2)
    for optimizer in build_optimizers(model, section(name, weight_decay=0.25)):
        for group in optimizer.param_groups:
            assert {p.dim() >= 2 for p in group["params"]} == {group["weight_decay"] == 0.25}
            assert group["weight_decay"] in (0.0, 0.25)


def test_adamw_moves_by_its_published_formula() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, in float64."""
    model = new_model()
    settings = section("adamw", weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6)
    (optimizer,) = build_optimizers(model, settings)
    parameter = model.embed_tokens.weight
    weight, first, second = parameter.detach().double(), torch.zeros(()), torch.zeros(())
    for step in range(1, 4):
        train(model, [optimizer], range(step, step + 1))
        assert parameter.grad is not None
        gradient = parameter.grad.double()
        first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
        direction = (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-6)
        weight = weight - 1e-2 * (direction + 0.1 * weight)
    torch.testing.assert_close(parameter.detach().double(), weight, rtol=1e-5, atol=1e-6)


def test_each_group_follows_its_own_peak() -> None:
    model = new_model()
    muon, adamw = build_optimizers(model, section(lr=0.5, muon_lr=0.25))
    for factor in (0.5, 1.0, 0.0):
        set_learning_rates([muon, adamw], factor)
        assert {group["lr"] for group in muon.param_groups} == {0.25 * factor}
        assert {group["lr"] for group in adamw.param_groups} == {0.5 * factor}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_state_goes_through_tensors_bit_for_bit(name: Name, dtype: str) -> None:
    """Training goes on from the tensors alone as it would have without them."""
    model, other = new_model(), new_model()
    optimizers, others = (build_optimizers(m, section(name, dtype=dtype)) for m in (model, other))
    train(model, optimizers, range(3))
    saved = {key: tensor.clone() for key, tensor in optimizer_tensors(optimizers, model).items()}
    other.load_state_dict(model.state_dict())
    load_optimizer_tensors(others, other, saved)
    assert saved.keys() == optimizer_tensors(others, other).keys()
    for each in (model, other):
        train(each, optimizers if each is model else others, range(3, 6))
    for (key, expected), actual in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(expected, actual), key
    for key, tensor in optimizer_tensors(optimizers, model).items():
        assert torch.equal(tensor, optimizer_tensors(others, other)[key]), key
        assert not torch.equal(tensor, saved[key]), f"{key} is not a copy or does not move"


def test_state_is_named_by_parameter_and_moment() -> None:
    model = new_model()
    optimizers = build_optimizers(model, section())
    assert optimizer_tensors(optimizers, model) == {}
    load_optimizer_tensors(optimizers, model, {})
    train(model, optimizers, range(1))
    tensors = optimizer_tensors(optimizers, model)
    assert tensors["layers.1.mlp.down_proj.weight.momentum_buffer"].shape == (32, 48)
    assert tensors["embed_tokens.weight.exp_avg_sq"].shape == (VOCAB, 32)
    assert tensors["final_norm.weight.step"].item() == 1.0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("layers.0.attn.o_proj.weight.momentum_buffer"), "layers.0.attn.o_proj.weight.momentum_buffer"),
        (lambda t: t.update({"embed_tokens.weight.exp_avg": torch.zeros(3, 32)}), "embed_tokens.weight.exp_avg"),
        (lambda t: t.update({"layers.7.attn.o_proj.weight.step": torch.zeros(())}), "layers.7.attn.o_proj.weight.step"),
    ],
    ids=["missing", "misshapen", "unknown"],
)
def test_state_that_does_not_fit_is_refused_whole(change: Any, named: str) -> None:
    model = new_model()
    optimizers = build_optimizers(model, section())
    train(model, optimizers, range(1))
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizers, model).items()}
    fresh = build_optimizers(model, section())
    change(tensors)
    with pytest.raises(ResumeError, match=named):
        load_optimizer_tensors(fresh, model, tensors)
    assert optimizer_tensors(fresh, model) == {}


@pytest.mark.parametrize(("saved", "wanted"), [("adamw", "muon"), ("muon", "adamw")])
def test_state_of_another_optimizer_is_refused(saved: Name, wanted: Name) -> None:
    model = new_model()
    optimizers = build_optimizers(model, section(saved))
    train(model, optimizers, range(1))
    with pytest.raises(ResumeError, match=r"start a new run\.dir"):
        load_optimizer_tensors(build_optimizers(model, section(wanted)), model, optimizer_tensors(optimizers, model))


@pytest.mark.parametrize("name", NAMES)
def test_loss_scaling_steps_on_numbers_and_skips_what_is_none(name: Name) -> None:
    """float16's GradScaler: gradients are unscaled before the step; an infinite one skips it and halves the scale."""
    model, plain = new_model(), new_model()
    scaled, unscaled = (build_optimizers(m, section(name)) for m in (model, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    torch.autograd.backward(scaler.scale(loss_of(model, seed=0)))
    for optimizer in scaled:
        scaler.step(optimizer)
    scaler.update()
    train(plain, unscaled, range(1))
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: value.clone() for key, value in optimizer_tensors(scaled, model).items()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    for optimizer in scaled:
        scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(torch.equal(state[key], value) for key, value in optimizer_tensors(scaled, model).items())


def test_muon_learns_faster_than_adamw() -> None:
    """Sixty steps of a tiny model from the same weights over the same batches; AdamW has the better of three rates."""

    def final_loss(name: Name, **rates: float) -> float:
        model = new_model()
        return train(model, build_optimizers(model, section(name, **rates)), range(60))

    adamw = min(final_loss("adamw", lr=rate) for rate in (3e-3, 1e-2, 2e-2))
    assert adamw < 2.0  # it does learn: a uniform guess has ln 29 = 3.37
    assert final_loss("muon", lr=1e-2, muon_lr=0.04) < adamw - 0.25
