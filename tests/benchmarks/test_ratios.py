"""The goals: against the best of each group, the preferred group first, and times the other way round."""

from __future__ import annotations

from benchmarks.ratios import (
    ANY,
    CT2_INT8,
    ENGINE,
    ENGINE_INT8,
    HTTP,
    LLAMA_BF16,
    LLAMA_SERVER,
    Goal,
    Ratio,
    compare,
    cpu_goals,
)


def only(goal: Goal, measured: dict[str, dict[str, float]]) -> Ratio:
    (ratio,) = compare([goal], measured)
    return ratio


def test_the_best_of_a_group_counts_and_a_goal_is_met_at_its_bound() -> None:
    goal = Goal("decode", ENGINE, "decode/8", (ANY,), 1.5)
    measured = {ENGINE: {"decode/8": 900.0}, LLAMA_BF16: {"decode/8": 600.0}, CT2_INT8: {"decode/8": 300.0}}
    ratio = only(goal, measured)
    assert (ratio.value, ratio.against, ratio.met) == (1.5, LLAMA_BF16, True)
    measured[CT2_INT8]["decode/8"] = 601.0
    ratio = only(goal, measured)
    assert (ratio.against, ratio.met) == (CT2_INT8, False)


def test_of_times_the_smallest_counts_and_the_ratio_is_theirs_over_ours() -> None:
    goal = Goal("first token", HTTP, "ttft_ms_p50/8", ((LLAMA_SERVER,), (LLAMA_BF16, CT2_INT8)), 2.0, None, True)
    measured = {HTTP: {"ttft_ms_p50/8": 50.0}, LLAMA_BF16: {"ttft_ms_p50/8": 90.0}, CT2_INT8: {"ttft_ms_p50/8": 95.0}}
    ratio = only(goal, measured)
    assert (ratio.value, ratio.against, ratio.met) == (1.8, LLAMA_BF16, False)
    measured[LLAMA_SERVER] = {"ttft_ms_p50/8": 200.0}
    assert (only(goal, measured).value, only(goal, measured).against) == (4.0, LLAMA_SERVER)


def test_what_was_not_measured_is_named() -> None:
    goal = Goal("decode", ENGINE_INT8, "decode/1", ((LLAMA_BF16,),), 1.0)
    assert only(goal, {}).missing == ENGINE_INT8
    alone = only(goal, {ENGINE_INT8: {"decode/1": 9.0}})
    assert (alone.value, alone.met, alone.missing) == (None, None, LLAMA_BF16)
    either = Goal("decode", ENGINE_INT8, "decode/1", (ANY,), 1.0)
    assert only(either, {ENGINE_INT8: {"decode/1": 9.0}}).missing == "any of theirs"
    assert only(goal, {LLAMA_BF16: {"decode/1": 9.0}}).missing == ENGINE_INT8


def test_every_row_of_the_projects_cpu_table_has_its_goal() -> None:
    bounds = {goal.name: goal.least for goal in cpu_goals() if goal.least is not None}
    assert bounds == {
        "decode, 1 stream, bf16": 1.0,
        "decode, 1 stream, int8": 1.0,
        "decode, 8 streams, bf16": 1.5,
        "decode, 32 streams, bf16": 1.75,
        "decode, 32 streams, int8": 2.2,
        "prefill, bf16": 1.0,
        "prefill, int8": 1.4,
        "decode, 8 streams at context 900, bf16": 1.5,
        "HTTP ÷ engine alone, 1 client": 0.95,
        "HTTP ÷ engine alone, 8 clients": 0.95,
        "HTTP ÷ engine alone, 32 clients": 0.95,
        "HTTP, 1 client": 1.0,
        "HTTP, 8 clients": 1.5,
        "HTTP, 32 clients": 2.0,
        "HTTP, first token p50, 8 clients": 2.0,
        "HTTP, first token p50, 32 clients": 2.0,
        "first token p50 with a shared prefix of 512 tokens, cache off ÷ on": 5.0,
    }
    assert len({goal.name + goal.ours for goal in cpu_goals()}) == len(cpu_goals())
