"""Learning rates as closed forms of the step: linear warm-up, then one of four courses down to a floor.

A factor depends on nothing but the step and the recipe, so a resumed run needs no schedule state. What follows from
a larger `train.max_steps` at resume: `constant` is the same; `wsd` is the same up to where its decay began, so a run
that is stopped before then goes on as if it had been that long from the start, and one stopped later returns to the
peak; `cosine` and `linear` are stretched, so the rate jumps up to the longer course.
"""

from __future__ import annotations

import math

from training.config import TrainSection


def lr_factor(step: int, config: TrainSection) -> float:
    """Learning rate of optimiser step `step` (0-based), as a fraction of the peak.

    Step s of the warm-up gets (s + 1)/warmup_steps, so the first step already learns; after it the factor begins
    at 1. With floor = min_lr_ratio, which the last step reaches exactly, and p running from 0 to 1:

        constant  1
        cosine    floor + (1 - floor)(1 + cos πp)/2, p over all steps after the warm-up (Loshchilov and Hutter 2017)
        linear    1 - (1 - floor)p, p likewise
        wsd       warm-up, stable, decay (Hu et al. 2024): 1, then linear over the last decay_fraction of max_steps
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    floor = config.min_lr_ratio
    match config.schedule:
        case "constant":
            return 1.0
        case "cosine":
            return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * _progress(step, config)))
        case "linear":
            return 1.0 - (1.0 - floor) * _progress(step, config)
        case "wsd":
            return 1.0 - (1.0 - floor) * _decay_progress(step, config)


def _progress(step: int, config: TrainSection) -> float:
    """From 0 at the first step after the warm-up to 1 at the last step."""
    span = max(1, config.max_steps - 1 - config.warmup_steps)
    return min(1.0, (step - config.warmup_steps) / span)


def _decay_progress(step: int, config: TrainSection) -> float:
    """0 up to the last stable step, then in equal parts to 1 at the last step."""
    stable_until = max(config.warmup_steps, config.max_steps - round(config.decay_fraction * config.max_steps))
    if step < stable_until:
        return 0.0
    return min(1.0, (step + 1 - stable_until) / max(1, config.max_steps - stable_until))
