"""Learning rate as a closed form of the step: linear warm-up, then half a cosine down to a floor.

The rate depends on nothing but the step, so a resumed run needs no schedule state.
"""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, min_ratio: float, warmup_steps: int, max_steps: int) -> float:
    """Rate of optimiser step `step` (0-based).

    Step s of the warm-up gets peak·(s+1)/warmup_steps, so the first step already learns. After it the rate is
    floor + (peak − floor)·(1 + cos πp)/2 with p running from 0 to 1 at the last step, and floor = peak·min_ratio.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    span = max(1, max_steps - 1 - warmup_steps)
    progress = min(1.0, (step - warmup_steps) / span)
    floor = peak * min_ratio
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
