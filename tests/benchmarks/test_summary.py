"""The statistics, against numpy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.summary import Summary, median_of_dicts, percentile
from benchmarks.workload import BatchTiming, Workload, random_prompts, rates, repeat_for


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], q: float) -> None:
    assert percentile(values, q) == pytest.approx(np.percentile(values, q), rel=1e-9, abs=1e-6)


def test_a_summary_of_nothing_is_none_and_a_percentile_of_nothing_is_an_error() -> None:
    assert Summary.of([]) is None
    assert Summary.of([2.0, 4.0]) == Summary(mean=3.0, p50=3.0, p99=pytest.approx(3.98))
    with pytest.raises(ValueError, match="at least one value"):
        percentile([], 50)


def test_medians_are_taken_figure_by_figure() -> None:
    runs = [{"a": 1.0, "b": 9.0}, {"a": 3.0, "b": 7.0}, {"a": 2.0, "b": 8.0}]
    assert median_of_dicts(runs) == {"a": 2.0, "b": 8.0}
    with pytest.raises(ValueError, match="same figures"):
        median_of_dicts([{"a": 1.0}, {"b": 1.0}])


def test_rates_are_sums_of_tokens_over_sums_of_seconds() -> None:
    timings = [BatchTiming(1.0, 2.0, 6, 8, 3.0), BatchTiming(3.0, 2.0, 6, 8, 5.0)]
    figures = rates(timings, batch=2, workload=Workload(prompt_len=10, output_len=4, vocab_size=50))
    assert figures == {"prefill": 10.0, "decode": 3.0, "end_to_end": 2.0, "runs": 2}


def test_prompts_are_reproducible_and_differ_by_seed() -> None:
    workload = Workload(prompt_len=16, output_len=1, vocab_size=100)
    prompts = random_prompts(workload, 3, seed=1)
    assert prompts == random_prompts(workload, 3, seed=1)
    assert len({tuple(p) for p in prompts + random_prompts(workload, 3, seed=2)}) == 6
    assert all(len(p) == 16 and min(p) >= 0 and max(p) < 100 for p in prompts)


def test_a_run_is_repeated_with_new_seeds_after_an_untimed_one() -> None:
    seeds: list[int] = []

    def run(seed: int) -> BatchTiming:
        seeds.append(seed)
        return BatchTiming(1, 1, 1, 1, float(seed))

    timings = repeat_for(0.0, run, at_least=3)
    assert seeds == [0, 1, 2, 3]
    assert [timing.total_seconds for timing in timings] == [1.0, 2.0, 3.0]
