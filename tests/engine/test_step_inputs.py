"""InputBuilder against a plain retelling, over random schedules; above all the block tables it keeps between steps."""

from __future__ import annotations

import random

import pytest
import torch

from model.packed_linear import MIN_ROWS
from model.sampling_params import SamplingParams
from server.engine.scheduler import ScheduledBatch
from server.engine.sequence import Sequence
from server.engine.step_inputs import InputBuilder, StepInputs

BLOCK = 4
MAX_LEN = 64
CPU = torch.device("cpu")


def new_builder() -> InputBuilder:
    return InputBuilder(max_num_seqs=8, max_blocks=MAX_LEN // BLOCK, block_size=BLOCK, device=CPU)


def sequence(request_id: int, prompt: int, *, computed: int = 0, output: int = 0, blocks: list[int]) -> Sequence:
    tokens = [1000 * request_id + position for position in range(prompt + output)]
    seq = Sequence(request_id, tokens[:prompt], SamplingParams(max_tokens=32), (), MAX_LEN, 0.0)
    seq.token_ids.extend(tokens[prompt:])
    seq.num_computed_tokens = computed
    seq.block_table = blocks
    return seq


def batch_of(decodes: list[Sequence], prefills: list[tuple[Sequence, int]]) -> ScheduledBatch:
    ends = [seq.num_computed_tokens + count == len(seq.token_ids) for seq, count in prefills]
    counts = [1] * len(decodes) + [count for _, count in prefills]
    return ScheduledBatch(
        sequences=decodes + [seq for seq, _ in prefills],
        num_scheduled_tokens=counts,
        needs_sample=[True] * len(decodes) + ends,
        num_decodes=len(decodes),
        num_tokens=sum(counts),
    )


def check(inputs: StepInputs, batch: ScheduledBatch) -> None:
    """Every tensor, told anew token by token."""
    tokens, positions, slots, rows, generated, ends = [], [], [], [], [], [0]
    for seq, count, wanted in zip(batch.sequences, batch.num_scheduled_tokens, batch.needs_sample, strict=True):
        for position in range(seq.num_computed_tokens, seq.num_computed_tokens + count):
            tokens.append(seq.token_ids[position])
            positions.append(position)
            slots.append(seq.block_table[position // BLOCK] * BLOCK + position % BLOCK)
        ends.append(len(tokens))
        if wanted:
            rows.append(len(tokens) - 1)
            generated.append(seq.num_output_tokens)
    padding = [0] * max(0, MIN_ROWS - len(tokens))
    metadata = inputs.metadata
    assert inputs.input_ids.tolist() == tokens + padding
    assert inputs.positions.tolist() == positions + padding
    assert inputs.sample_rows.tolist() == rows
    assert inputs.sample_positions.tolist() == generated
    assert metadata.slot_mapping.tolist() == slots + [-1] * len(padding)
    assert metadata.cu_seqlens_q.tolist() == ends
    contexts = [s.num_computed_tokens + n for s, n in zip(batch.sequences, batch.num_scheduled_tokens, strict=True)]
    assert metadata.context_lens.tolist() == contexts
    for row, (seq, context) in enumerate(zip(batch.sequences, contexts, strict=True)):
        used = -(-context // BLOCK)
        assert metadata.block_tables[row, :used].tolist() == seq.block_table[:used]
    assert metadata.num_tokens == len(tokens)
    assert metadata.max_query_len == max(batch.num_scheduled_tokens)
    assert metadata.max_context_len == max(contexts)


def build_and_check(builder: InputBuilder, batch: ScheduledBatch) -> StepInputs:
    inputs = builder.build(batch)
    check(inputs, batch)
    return inputs


def test_decodes_and_chunks_in_one_step() -> None:
    decode = sequence(1, 6, computed=7, output=2, blocks=[5, 3])
    whole = sequence(2, 3, blocks=[9])
    chunk = sequence(3, 20, computed=4, blocks=[2, 8, 0, 1, 4])
    inputs = build_and_check(new_builder(), batch_of([decode], [(whole, 3), (chunk, 5)]))
    assert inputs.sample_rows.tolist() == [0, 3]  # the chunk does not reach its prompt's end
    assert inputs.sample_positions.tolist() == [2, 0]
    assert inputs.metadata.slot_mapping.tolist() == [15, 36, 37, 38, 32, 33, 34, 35, 0]


def test_recomputing_after_preemption_counts_the_tokens_generated_before() -> None:
    seq = sequence(1, 3, output=4, blocks=[1, 0])
    inputs = build_and_check(new_builder(), batch_of([], [(seq, 7)]))
    assert inputs.sample_positions.tolist() == [4]


def test_a_chunk_without_a_sample() -> None:
    inputs = build_and_check(new_builder(), batch_of([], [(sequence(1, 9, blocks=[1, 0, 2]), 4)]))
    assert inputs.sample_rows.shape == inputs.sample_positions.shape == (0,)


def test_a_single_token_is_padded_with_rows_that_are_stored_nowhere() -> None:
    inputs = build_and_check(new_builder(), batch_of([sequence(1, 6, computed=6, output=1, blocks=[5, 3])], []))
    assert inputs.input_ids.shape == inputs.positions.shape == (MIN_ROWS,)
    assert inputs.metadata.slot_mapping.tolist() == [3 * BLOCK + 2] + [-1] * (MIN_ROWS - 1)
    assert inputs.metadata.num_tokens == 1
    assert inputs.metadata.context_lens.tolist() == [7]


def test_types_are_those_that_the_kernels_read() -> None:
    inputs = new_builder().build(batch_of([], [(sequence(1, 9, blocks=[1, 0, 2]), 9)]))
    metadata = inputs.metadata
    for tensor in (metadata.cu_seqlens_q, metadata.context_lens, metadata.block_tables):
        assert tensor.dtype == torch.int32
    for tensor in (inputs.input_ids, inputs.positions, inputs.sample_rows, inputs.sample_positions):
        assert tensor.dtype == torch.int64
    assert metadata.slot_mapping.dtype == torch.int64
    assert metadata.block_tables.stride(1) == 1


def test_other_blocks_after_a_preemption_are_noticed() -> None:
    """The same request, row and number of blocks: only the count of preemptions tells."""
    builder = new_builder()
    seq = sequence(1, 8, blocks=[1, 2])
    build_and_check(builder, batch_of([], [(seq, 8)]))
    seq.block_table, seq.num_computed_tokens, seq.num_preemptions = [7, 0], 0, 1
    build_and_check(builder, batch_of([], [(seq, 8)]))


def test_a_failed_step_may_be_repeated() -> None:
    builder = new_builder()
    batch = batch_of([sequence(1, 6, computed=6, output=1, blocks=[5, 3])], [(sequence(2, 3, blocks=[9]), 3)])
    first = builder.build(batch).metadata.block_tables.clone()
    again = build_and_check(builder, batch)
    assert torch.equal(again.metadata.block_tables, first)


@pytest.mark.parametrize("seed", range(20))
def test_random_schedules(seed: int) -> None:
    """Sequences join, grow, change rows, are preempted, leave and are followed by others in their rows."""
    rng = random.Random(seed)
    builder, living, next_id = new_builder(), [], 0
    for _ in range(60):
        for seq in [seq for seq in living if rng.random() < 0.08]:
            living.remove(seq)
        for seq in living:
            if rng.random() < 0.08:
                seq.num_preemptions += 1
                seq.num_computed_tokens, seq.block_table = 0, []
        while len(living) < 8 and (rng.random() < 0.4 or not living):
            next_id += 1
            living.append(sequence(next_id, rng.randint(1, 20), blocks=[]))
        rng.shuffle(living)
        decodes, prefills = [], []
        for seq in living[: rng.randint(1, len(living))]:
            left = len(seq.token_ids) - seq.num_computed_tokens
            count = left if left == 1 or rng.random() < 0.5 else rng.randint(1, left)
            missing = -(-(seq.num_computed_tokens + count) // BLOCK) - len(seq.block_table)
            seq.block_table.extend(rng.randrange(500) for _ in range(missing))
            if left == 1 and seq.num_output_tokens:
                decodes.append(seq)
            else:
                prefills.append((seq, count))
        batch = batch_of(decodes, prefills)
        build_and_check(builder, batch)
        for seq, count, wanted in zip(batch.sequences, batch.num_scheduled_tokens, batch.needs_sample, strict=True):
            seq.num_computed_tokens += count
            if wanted:
                seq.token_ids.append(rng.randrange(50))
        living = [seq for seq in living if len(seq.token_ids) < MAX_LEN]


def scored(request_id: int, prompt: int, *, max_tokens: int, start: int = 1, blocks: list[int]) -> Sequence:
    ids = [1000 * request_id + position for position in range(prompt)]
    params = SamplingParams(max_tokens=max_tokens)
    seq = Sequence(request_id, ids, params, (), MAX_LEN, 0.0, prompt_logprobs=0, prompt_logprobs_start=start)
    seq.block_table = blocks
    return seq


def test_scored_rows_stand_among_the_sampled_ones() -> None:
    decode = sequence(1, 6, computed=7, output=2, blocks=[5, 3])
    part = scored(2, 9, max_tokens=0, start=3, blocks=[0, 1])
    whole = scored(3, 3, max_tokens=4, blocks=[9])
    plain = sequence(4, 2, blocks=[2])
    again = scored(5, 3, max_tokens=4, blocks=[4])
    assert again.prompt_score is not None
    again.prompt_score.take(0, 3)  # before it was preempted
    inputs = new_builder().build(batch_of([decode], [(part, 4), (whole, 3), (plain, 2), (again, 3)]))
    assert inputs.input_ids.tolist() == [1007, 2000, 2001, 2002, 2003, 3000, 3001, 3002, 4000, 4001, 5000, 5001, 5002]
    assert inputs.sample_rows.tolist() == [0, 3, 4, 5, 6, 7, 9, 12]
    assert inputs.sample_positions.tolist() == [2, 0, 0, 0]
    assert inputs.score is not None
    assert inputs.sample_rows[inputs.score.sampled].tolist() == [0, 7, 9, 12]
    assert inputs.input_ids[inputs.sample_rows[inputs.score.scored]].tolist() == [2002, 2003, 3000, 3001]
    assert inputs.score.targets.tolist() == [2003, 2004, 3001, 3002]
