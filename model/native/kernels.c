/* CPU kernels that torch has no operator for. Plain C with vector extensions, no Python.h: loaded through ctypes.
 *
 * Instruction sets are chosen when the library is called, so one build serves every machine of an architecture.
 * Threads are those of the OpenMP runtime that torch has already loaded (its GOMP_parallel is handed over), because
 * two runtimes would keep two pools of spinning threads on the same cores.
 */

#include <pthread.h>

#include "common.h"

#define MAX_ROWS 4  /* query rows that share the loads of one pass over the keys */
#define MAX_GROUP 4  /* tiles whose scores are computed together */
#define MAX_CHUNKS 4 /* vectors of 16 dimensions whose sums are computed together */

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

typedef struct {
    uint32_t *query;
    float *scores, *sums;
    void *weights, *output;
    const char **key_tiles, **value_tiles;
} scratch;

static inline int64_t padded_dim(int64_t head_dim) { return (head_dim + TILE - 1) / TILE * TILE; }

static inline int64_t tile_index(const attention_step *p, int64_t seq, int64_t kv_head, int64_t tile) {
    const int64_t tiles_each = p->block_size / TILE;
    const int64_t block = p->block_tables[seq * p->max_blocks + tile / tiles_each];
    return (block * p->num_kv_heads + kv_head) * tiles_each + tile % tiles_each;
}

#define KERNELS "paged_attention.h"
#include "variants.h"

typedef struct {
    const char *name;
    void (*store_head)(const attention_step *, int64_t, int64_t);
    void (*attend_rows)(const attention_step *, scratch *, int64_t, int64_t, int64_t, int64_t);
} variant;

static variant variants[2]; /* float32, bfloat16 */
void (*quill_run_parallel)(void (*)(void *), void *, unsigned, unsigned);
static pthread_key_t arena_key;
static pthread_once_t arena_key_once = PTHREAD_ONCE_INIT;

static void make_arena_key(void) { pthread_key_create(&arena_key, free); }

static void choose_variants(int most) {
    variant f32 = {"portable", store_head_f32_base, attend_rows_f32_base};
    variant bf16 = {"portable", store_head_bf16_base, attend_rows_bf16_base};
#ifdef HAVE_X86_VARIANTS
    __builtin_cpu_init();
    if (most >= AVX2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        f32 = (variant){"avx2", store_head_f32_avx2, attend_rows_f32_avx2};
        bf16 = (variant){"avx2", store_head_bf16_avx2, attend_rows_bf16_avx2};
    }
    if (most >= AVX512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        f32 = (variant){"avx512", store_head_f32_avx512, attend_rows_f32_avx512};
        if (__builtin_cpu_supports("avx512bf16"))
            bf16 = (variant){"avx512_bf16", store_head_bf16_avx512, attend_rows_bf16_avx512};
    }
#else
    (void)most;
#endif
    variants[0] = f32;
    variants[1] = bf16;
}

/* Choose the instruction sets, none above `most`, and take over a thread pool: `gomp_parallel` may be null (then all
 * runs in the caller). To be called before any other function, and not while one runs. */
void quill_init(void *gomp_parallel, int most) {
    pthread_once(&arena_key_once, make_arena_key);
    choose_variants(most);
    quill_choose_training(most);
    quill_choose_elementwise(most);
    quill_run_parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))gomp_parallel;
}

/* The name of the variant in use. */
const char *quill_variant(int is_bfloat16) { return variants[is_bfloat16 ? 1 : 0].name; }

/* What the caller's mirror of attention_step must measure. */
int64_t quill_step_size(void) { return sizeof(attention_step); }

/* Per-thread working memory, kept between calls, grown when a longer context comes and freed with its thread. */
static _Thread_local char *arena;
static _Thread_local size_t arena_size;

void *quill_arena(size_t size) {
    if (size > arena_size) {
        free(arena);
        arena = aligned_alloc(64, (size + 63) / 64 * 64);
        arena_size = arena ? size : 0;
        pthread_setspecific(arena_key, arena);
    }
    return arena;
}

static int make_scratch(const attention_step *p, int64_t max_tiles, scratch *s) {
    const size_t tokens = (size_t)max_tiles * TILE, padded = (size_t)padded_dim(p->head_dim);
    const size_t need = MAX_ROWS * (padded * 12 + tokens * 8) + (size_t)(max_tiles + MAX_GROUP) * 16 + 64 * 16;
    char *at = quill_arena(need);
    if (!at) return 0;
    s->query = take(&at, MAX_ROWS * padded * 4);
    s->scores = take(&at, MAX_ROWS * tokens * 4);
    s->weights = take(&at, MAX_ROWS * tokens * 4);
    s->sums = take(&at, MAX_ROWS * padded * 4);
    s->output = take(&at, MAX_ROWS * padded * 4);
    s->key_tiles = take(&at, (size_t)(max_tiles + MAX_GROUP) * 8);
    s->value_tiles = take(&at, (size_t)(max_tiles + MAX_GROUP) * 8);
    return 1;
}

typedef struct {
    const attention_step *step;
    const variant *kernel;
    int64_t max_tiles, max_row_groups;
    int store, attend, split_rows;
    atomic_llong next;
    atomic_int failed;
} job;

static int64_t num_rows(const attention_step *p, int64_t seq) {
    return (p->cu_seqlens_q[seq + 1] - p->cu_seqlens_q[seq]) * (p->num_heads / p->num_kv_heads);
}

static void attend_group(const job *j, scratch *s, int64_t seq, int64_t kv_head, int64_t row) {
    const int64_t left = num_rows(j->step, seq) - row;
    if (left > 0) j->kernel->attend_rows(j->step, s, seq, kv_head, row, left < MAX_ROWS ? left : MAX_ROWS);
}

/* One unit is a sequence and kv head, or a group of its rows when `split_rows`. */
static void work(void *data) {
    job *j = data;
    const attention_step *p = j->step;
    const int64_t parts = j->split_rows ? j->max_row_groups : 1;
    const int64_t units = p->num_seqs * p->num_kv_heads * parts;
    scratch s;
    if (!make_scratch(p, j->max_tiles, &s)) {
        atomic_store(&j->failed, 1);
        return;
    }
    for (;;) {
        const int64_t unit = atomic_fetch_add(&j->next, 1);
        if (unit >= units) return;
        const int64_t seq = unit / parts / p->num_kv_heads, kv_head = unit / parts % p->num_kv_heads;
        if (j->store) j->kernel->store_head(p, seq, kv_head);
        if (!j->attend) continue;
        if (j->split_rows)
            attend_group(j, &s, seq, kv_head, unit % parts * MAX_ROWS);
        else
            for (int64_t row = 0; row < num_rows(p, seq); row += MAX_ROWS) attend_group(j, &s, seq, kv_head, row);
    }
}

static int run(job *j) {
    atomic_store(&j->next, 0);
    if (quill_run_parallel && j->step->num_threads > 1)
        quill_run_parallel(work, j, (unsigned)j->step->num_threads, 0);
    else
        work(j);
    return atomic_load(&j->failed) ? -1 : 0;
}

/* Store the step's keys and values, then attend. Returns 0; -1 when memory ran out; -2, having done nothing, when a
 * cache does not lie on 64 bytes or a sequence has more queries than tokens. */
int quill_paged_attention(const attention_step *p) {
    if (((uintptr_t)p->key_cache | (uintptr_t)p->value_cache) % 64) return -2;
    job j = {.step = p, .kernel = &variants[p->is_bfloat16 ? 1 : 0]};
    for (int64_t seq = 0; seq < p->num_seqs; seq++) {
        const int64_t queries = p->cu_seqlens_q[seq + 1] - p->cu_seqlens_q[seq];
        if (queries < 0 || queries > p->context_lens[seq]) return -2;
        const int64_t tiles = (p->context_lens[seq] + TILE - 1) / TILE;
        const int64_t groups = (num_rows(p, seq) + MAX_ROWS - 1) / MAX_ROWS;
        j.max_tiles = tiles > j.max_tiles ? tiles : j.max_tiles;
        j.max_row_groups = groups > j.max_row_groups ? groups : j.max_row_groups;
    }
    /* With plenty of heads each unit stores and attends in one pass; otherwise, all must be stored before the rows of
     * one head are shared out. */
    j.store = 1;
    j.attend = p->num_seqs * p->num_kv_heads >= 4 * (int64_t)p->num_threads || j.max_row_groups <= 1;
    if (run(&j) != 0 || j.attend) return atomic_load(&j.failed) ? -1 : 0;
    j.store = 0;
    j.attend = j.split_rows = 1;
    return run(&j);
}
