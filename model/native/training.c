/* CPU kernels of training: causal attention of whole sequences with its gradient, and dropout.
 *
 * Random numbers are counters through a hash: a mask is a function of the seed and the element's place, so it is made
 * again in the backward pass instead of being kept, and threads do not change it.
 */

#include "common.h"

#define BLOCK 32 /* query rows whose scores exist at a time */

/* Attention of one layer. Mirrored by `_DenseStep` in model/dense_attention.py. Tensors are [batch, length, heads,
 * head_dim]; strides are those of a token, in elements, and heads lie side by side. `output_stride` is that of the
 * output's gradient too. `window` 0 means none. Weights whose hash lies below `drop_below` are dropped, the others
 * scaled by `keep_scale`. `log_sums` is [batch, heads, length]. The gradients are null in the forward pass. */
typedef struct {
    const void *query, *key, *value;
    void *output;
    float *log_sums;
    const void *output_grad;
    void *query_grad, *key_grad, *value_grad;
    int64_t query_stride, key_stride, value_stride, output_stride;
    int64_t query_grad_stride, key_grad_stride, value_grad_stride;
    int64_t batch, length, num_heads, num_kv_heads, head_dim, window;
    uint64_t seed;
    float scale, keep_scale;
    uint32_t drop_below;
    int32_t is_bfloat16, num_threads;
} dense_step;

/* A thread's memory for one sequence and kv head. `padded` is the length rounded up to whole tiles. */
typedef struct {
    int64_t padded;
    uint32_t *key_columns, *value_columns; /* [head_dim / PAIR][padded] */
    uint32_t *key_rows, *value_rows;       /* [padded / PAIR][head_dim] */
    uint32_t *pairs, *block_rows;          /* [BLOCK / PAIR][padded], [BLOCK / PAIR][head_dim] */
    float *scores, *weight_grads, *rows;   /* [BLOCK][padded] twice, [BLOCK][head_dim] */
    void *weights, *slopes;                /* [BLOCK][padded] elements */
    float *key_grads, *value_grads;        /* [padded][head_dim] */
} dense_scratch;

/* Queries first … first + rows - 1 of one head and their keys low … low + keys - 1. `head_row` is the first query's
 * place in log_sums. */
typedef struct {
    int64_t first, rows, low, keys, head_row;
    const void *query, *output_grad;
    void *output, *query_grad;
} block;

/* SplitMix64's finaliser (Steele, Lea and Flood 2014). */
static inline uint64_t mix64(uint64_t value) {
    value += 0x9e3779b97f4a7c15u;
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
    return value ^ (value >> 31);
}

static inline uint32_t row_key(const dense_step *p, int64_t row) {
    return (uint32_t)(mix64(p->seed ^ mix64((uint64_t)row)) >> 32);
}

/* All ones in the lanes whose element first + lane of the row `key` is kept. The hash is a 32-bit xor-multiply
 * finaliser with the constants of the low-bias search of hash-prospector (Wellons 2018). */
static inline __attribute__((always_inline)) v16i kept16(uint32_t key, uint32_t first, uint32_t drop_below) {
    const v16u lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    v16u x = ((lane + first) * 0x9e3779b9u) ^ key;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    return (v16i)(x >= drop_below);
}

#define KERNELS "dense_attention.h"
#include "variants.h"
#define KERNELS "dropout.h"
#include "variants.h"

typedef struct {
    void (*attend_sequence)(const dense_step *, const dense_scratch *, int64_t, int64_t);
    void (*drop_chunk)(const void *, void *, int64_t, uint32_t, uint32_t, float);
} variant;

static const variant VARIANTS[2][3] = {
    {
        {attend_sequence_f32_base, drop_chunk_f32_base},
#ifdef HAVE_X86_VARIANTS
        {attend_sequence_f32_avx2, drop_chunk_f32_avx2},
        {attend_sequence_f32_avx512, drop_chunk_f32_avx512},
#endif
    },
    {
        {attend_sequence_bf16_base, drop_chunk_bf16_base},
#ifdef HAVE_X86_VARIANTS
        {attend_sequence_bf16_avx2, drop_chunk_bf16_avx2},
        {attend_sequence_bf16_avx512, drop_chunk_bf16_avx512},
#endif
    },
};
static variant variants[2]; /* by element type */

void quill_choose_training(int most) {
    for (int element = FLOAT32; element <= BFLOAT16; element++)
        variants[element] = VARIANTS[element][quill_instruction_set(element, most)];
}

/* What the caller's mirror of dense_step must measure. */
int64_t quill_dense_step_size(void) { return sizeof(dense_step); }

typedef struct {
    const dense_step *step;
    atomic_llong next;
    atomic_int failed;
} dense_job;

static int make_dense_scratch(const dense_step *p, dense_scratch *s) {
    const size_t padded = (size_t)(p->length + TILE - 1) / TILE * TILE, d = (size_t)p->head_dim;
    const size_t matrix = padded * d * 4, strip = BLOCK * padded * 4;
    char *at = quill_arena(6 * matrix + 5 * strip + 2 * BLOCK * d * 4 + 16 * 64);
    if (!at) return 0;
    s->padded = (int64_t)padded;
    s->key_columns = take(&at, matrix);
    s->value_columns = take(&at, matrix);
    s->key_rows = take(&at, matrix);
    s->value_rows = take(&at, matrix);
    s->key_grads = take(&at, matrix);
    s->value_grads = take(&at, matrix);
    s->scores = take(&at, strip);
    s->weight_grads = take(&at, strip);
    s->weights = take(&at, strip);
    s->slopes = take(&at, strip);
    s->pairs = take(&at, strip);
    s->rows = take(&at, BLOCK * d * 4);
    s->block_rows = take(&at, BLOCK * d * 4);
    return 1;
}

static void work(void *data) {
    dense_job *j = data;
    const dense_step *p = j->step;
    const variant *kernel = &variants[p->is_bfloat16 ? 1 : 0];
    dense_scratch s;
    if (!make_dense_scratch(p, &s)) {
        atomic_store(&j->failed, 1);
        return;
    }
    for (;;) {
        const int64_t unit = atomic_fetch_add(&j->next, 1);
        if (unit >= p->batch * p->num_kv_heads) return;
        kernel->attend_sequence(p, &s, unit / p->num_kv_heads, unit % p->num_kv_heads);
    }
}

/* Forward, or backward where query_grad is given. Returns 0, or -1 when memory ran out. */
int quill_dense_attention(const dense_step *p) {
    dense_job j = {.step = p};
    if (quill_run_parallel && p->num_threads > 1)
        quill_run_parallel(work, &j, (unsigned)p->num_threads, 0);
    else
        work(&j);
    return atomic_load(&j.failed) ? -1 : 0;
}

#define CHUNK 4096 /* elements that share a row key of the hash */

typedef struct {
    const char *input;
    char *output;
    int64_t count, element_size;
    uint64_t seed;
    uint32_t drop_below;
    float keep_scale;
    const variant *kernel;
    atomic_llong next;
} dropout_job;

static void drop(void *data) {
    dropout_job *j = data;
    for (;;) {
        const int64_t chunk = atomic_fetch_add(&j->next, 1), first = chunk * CHUNK;
        if (first >= j->count) return;
        const int64_t left = j->count - first;
        j->kernel->drop_chunk(j->input + first * j->element_size, j->output + first * j->element_size,
                              left < CHUNK ? left : CHUNK, (uint32_t)(mix64(j->seed ^ mix64((uint64_t)chunk)) >> 32),
                              j->drop_below, j->keep_scale);
    }
}

/* output[i] = input[i] * keep_scale, or 0 where element i's hash lies below drop_below. */
void quill_dropout(const void *input, void *output, int64_t count, uint64_t seed, uint32_t drop_below, float keep_scale,
                   int is_bfloat16, int num_threads) {
    dropout_job j = {input, output, count, is_bfloat16 ? 2 : 4, seed, drop_below, keep_scale, &variants[is_bfloat16 ? 1 : 0]};
    if (quill_run_parallel && num_threads > 1 && count > 4 * CHUNK)
        quill_run_parallel(drop, &j, (unsigned)num_threads, 0);
    else
        drop(&j);
}
