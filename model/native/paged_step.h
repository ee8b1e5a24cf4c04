/* One layer's attention over the paged cache: what kernels.c runs by itself and decoder.c as part of a step. */

#ifndef QUILL_PAGED_STEP_H
#define QUILL_PAGED_STEP_H

#include "common.h"

/* One layer of one step. Mirrored by `_AttentionStep` in model/attention_cpu.py. Strides are in elements;
 * output is [N, num_heads, head_dim] without gaps. `window` 0 means none. */
typedef struct {
    const void *query, *key, *value;
    void *key_cache, *value_cache, *output;
    int64_t query_stride, key_stride, value_stride;
    const int32_t *cu_seqlens_q, *context_lens, *block_tables;
    int64_t num_seqs, max_blocks, num_heads, num_kv_heads, head_dim, block_size, window;
    float scale;
    int32_t is_bfloat16, num_threads;
} attention_step;

/* What several threads do in one or two passes, between which all must have finished. */
typedef struct {
    int64_t max_tiles, max_row_groups, heads_each;
    int needs_two_passes;
} attention_plan;

enum { STORE_AND_ATTEND, STORE, ATTEND };

/* How to run a step on so many threads. Returns 0, or -2 when a cache does not lie on 64 bytes or a sequence has more
 * queries than tokens. */
SHARED int quill_plan_attention(const attention_step *step, int num_threads, attention_plan *plan);

/* A thread's share of one pass: units are claimed from `next`, which starts at 0. Returns 0, or -1 without memory. */
SHARED int quill_attention_pass(const attention_step *step, const attention_plan *plan, int pass, atomic_llong *next);

#endif
