"""The courses of the learning rate against torch's schedulers, closed forms and what must hold for any recipe."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.config import TrainSection
from training.schedule import lr_factor

SCHEDULES = ("cosine", "wsd", "linear", "constant")


@st.composite
def sections(draw: st.DrawFn) -> TrainSection:
    return TrainSection(
        schedule=draw(st.sampled_from(SCHEDULES)),
        max_steps=draw(st.integers(1, 400)),
        warmup_steps=draw(st.integers(0, 450)),
        min_lr_ratio=draw(st.floats(0.0, 1.0)),
        decay_fraction=draw(st.floats(0.0, 1.0)),
    )


def course(config: TrainSection, steps: int | None = None) -> list[float]:
    return [lr_factor(step, config) for step in range(config.max_steps if steps is None else steps)]


def torch_course(scheduler: type, steps: int, **options: float) -> list[float]:
    """The factors of a scheduler of torch's, whose steps begin after the warm-up."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, factors = scheduler(optimizer, **options), []
    for _ in range(steps):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return factors


def test_cosine_is_torchs() -> None:
    config = TrainSection(schedule="cosine", max_steps=61, warmup_steps=10, min_lr_ratio=0.1)
    expected = torch_course(torch.optim.lr_scheduler.CosineAnnealingLR, 51, T_max=50, eta_min=0.1)
    assert course(config)[10:] == pytest.approx(expected)


def test_linear_is_torchs() -> None:
    config = TrainSection(schedule="linear", max_steps=61, warmup_steps=10, min_lr_ratio=0.1)
    expected = torch_course(torch.optim.lr_scheduler.LinearLR, 51, start_factor=1.0, end_factor=0.1, total_iters=50)
    assert course(config)[10:] == pytest.approx(expected)


def test_wsd_warms_up_stays_and_decays() -> None:
    config = TrainSection(schedule="wsd", max_steps=20, warmup_steps=4, min_lr_ratio=0.2, decay_fraction=0.2)
    expected = [0.25, 0.5, 0.75, 1.0, *[1.0] * 12, 0.8, 0.6, 0.4, 0.2]
    assert course(config) == pytest.approx(expected)


def test_constant_only_warms_up() -> None:
    config = TrainSection(schedule="constant", max_steps=5, warmup_steps=2, min_lr_ratio=0.1)
    assert course(config) == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_a_single_step_is_at_the_peak() -> None:
    config = TrainSection(schedule="cosine", max_steps=1, warmup_steps=0, min_lr_ratio=0.5)
    assert lr_factor(0, config) == 1.0


@given(sections())
def test_factors_stay_between_floor_and_peak(config: TrainSection) -> None:
    factors = course(config, config.max_steps + 50)  # a recipe whose max_steps was lowered asks for no more than this
    warmup, rest = factors[: config.warmup_steps], factors[config.warmup_steps :]
    assert all(0.0 < factor <= 1.0 for factor in warmup)
    assert all(config.min_lr_ratio - 1e-12 <= factor <= 1.0 + 1e-12 for factor in rest)


@given(sections())
def test_the_rate_rises_evenly_and_then_never_again(config: TrainSection) -> None:
    factors = course(config, config.max_steps + 50)
    for step, (before, after) in enumerate(itertools.pairwise(factors)):
        if step + 1 < config.warmup_steps:
            assert after - before == pytest.approx(1.0 / config.warmup_steps)
        elif step + 1 > config.warmup_steps:
            assert after <= before + 1e-12


@given(sections())
def test_there_is_no_jump_at_a_seam(config: TrainSection) -> None:
    """No step moves further than the steepest slope of its course allows: that of the cosine is π/2 of the line's."""
    factors = course(config)
    lengths = {
        "constant": 1e12,
        "wsd": round(config.decay_fraction * config.max_steps),
        "linear": config.max_steps - 1 - config.warmup_steps,
        "cosine": (config.max_steps - 1 - config.warmup_steps) / 1.5708,
    }
    steepest = (1.0 - config.min_lr_ratio) / max(
        1e-12, min(lengths[config.schedule], config.max_steps - config.warmup_steps)
    )
    for step in range(config.warmup_steps, len(factors)):
        before = factors[step - 1] if step else 1.0
        assert abs(factors[step] - before) <= steepest + 1e-9


@given(sections())
def test_the_last_step_reaches_the_floor(config: TrainSection) -> None:
    decays = config.max_steps - config.warmup_steps >= 2 and round(config.decay_fraction * config.max_steps) >= 1
    if decays and config.schedule != "constant":
        assert course(config)[-1] == pytest.approx(config.min_lr_ratio)


@given(sections(), st.integers(0, 300))
def test_a_longer_wsd_run_repeats_the_stable_steps_of_the_shorter(config: TrainSection, more: int) -> None:
    short = replace(config, schedule="wsd")
    longer = replace(short, max_steps=short.max_steps + more)
    stable = max(0, short.max_steps - round(short.decay_fraction * short.max_steps))
    assert course(longer)[:stable] == course(short)[:stable]
