/* CPU kernels that torch has no operator for. Plain C with vector extensions, no Python.h: loaded through ctypes.
 *
 * Instruction sets are chosen when the library is called, so one build serves every machine of an architecture.
 * Threads are those of the OpenMP runtime that torch has already loaded (its GOMP_parallel is handed over), because
 * two runtimes would keep two pools of spinning threads on the same cores.
 */

#include <pthread.h>

#include "paged_step.h"

#define MAX_ROWS 4  /* query rows that share the loads of one pass over the keys */
#define MAX_GROUP 4  /* tiles whose scores are computed together */
#define MAX_CHUNKS 4 /* vectors of 16 dimensions whose sums are computed together */

typedef struct {
    uint32_t *query;
    float *scores, *sums, *totals;
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
    void (*decode_heads)(const attention_step *, scratch *, int64_t, int64_t, int64_t, int64_t);
} variant;

static const variant FLOAT32_VARIANTS[] = {
    {"portable", store_head_f32_base, attend_rows_f32_base, decode_heads_f32_base},
#ifdef HAVE_X86_VARIANTS
    {"avx2", store_head_f32_avx2, attend_rows_f32_avx2, decode_heads_f32_avx2},
    {"avx512", store_head_f32_avx512, attend_rows_f32_avx512, decode_heads_f32_avx512},
#endif
};
static const variant BFLOAT16_VARIANTS[] = {
    {"portable", store_head_bf16_base, attend_rows_bf16_base, decode_heads_bf16_base},
#ifdef HAVE_X86_VARIANTS
    {"avx2", store_head_bf16_avx2, attend_rows_bf16_avx2, decode_heads_bf16_avx2},
    {"avx512_bf16", store_head_bf16_avx512, attend_rows_bf16_avx512, decode_heads_bf16_avx512},
#endif
};
static const variant *variants[2] = {FLOAT32_VARIANTS, BFLOAT16_VARIANTS}; /* by element type */
void (*quill_run_parallel)(void (*)(void *), void *, unsigned, unsigned);
int (*quill_team_size)(void);
static pthread_key_t arena_key;
static pthread_once_t arena_key_once = PTHREAD_ONCE_INIT;

static void make_arena_key(void) { pthread_key_create(&arena_key, free); }

int quill_instruction_set(int element, int most) {
    int best = PORTABLE;
#ifdef HAVE_X86_VARIANTS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = AVX2;
    if (best == AVX2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        (element != BFLOAT16 || __builtin_cpu_supports("avx512bf16")) &&
        (element != INT8 || __builtin_cpu_supports("avx512vnni")))
        best = AVX512;
#endif
    return best < most ? best : most;
}

/* Choose the instruction sets, none above `most`, and take over a thread pool: `gomp_parallel`, and `team_size`, which says
 * how many threads it gave, may be null (then all runs in the caller). To be called before any other function, and not while one runs. */
void quill_init(void *gomp_parallel, void *team_size, int most) {
    pthread_once(&arena_key_once, make_arena_key);
    variants[FLOAT32] = &FLOAT32_VARIANTS[quill_instruction_set(FLOAT32, most)];
    variants[BFLOAT16] = &BFLOAT16_VARIANTS[quill_instruction_set(BFLOAT16, most)];
    quill_choose_training(most);
    quill_choose_elementwise(most);
    quill_choose_decoder(most);
    quill_run_parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))gomp_parallel;
    quill_team_size = (int (*)(void))team_size;
}

/* The name of the variant in use. */
const char *quill_variant(int is_bfloat16) { return variants[is_bfloat16 ? BFLOAT16 : FLOAT32]->name; }

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

/* Room for `heads` kv heads at a time. */
static int make_scratch(const attention_step *p, int64_t max_tiles, int64_t heads, scratch *s) {
    const size_t tokens = (size_t)max_tiles * TILE, padded = (size_t)padded_dim(p->head_dim);
    const size_t rows = MAX_ROWS * (size_t)heads, tiles = (size_t)(max_tiles + MAX_GROUP) * (size_t)heads;
    char *at = quill_arena(rows * (padded * 12 + tokens * 8 + 4) + tiles * 16 + 64 * 16);
    if (!at) return 0;
    s->query = take(&at, rows * padded * 4);
    s->scores = take(&at, rows * tokens * 4);
    s->weights = take(&at, rows * tokens * 4);
    s->sums = take(&at, rows * padded * 4);
    s->totals = take(&at, rows * 4);
    s->output = take(&at, rows * padded * 4);
    s->key_tiles = take(&at, tiles * 8);
    s->value_tiles = take(&at, tiles * 8);
    return 1;
}

static int64_t num_rows(const attention_step *p, int64_t seq) {
    return (p->cu_seqlens_q[seq + 1] - p->cu_seqlens_q[seq]) * (p->num_heads / p->num_kv_heads);
}

int quill_plan_attention(const attention_step *p, int num_threads, attention_plan *plan) {
    *plan = (attention_plan){0};
    if (((uintptr_t)p->key_cache | (uintptr_t)p->value_cache) % 64) return -2;
    for (int64_t seq = 0; seq < p->num_seqs; seq++) {
        const int64_t queries = p->cu_seqlens_q[seq + 1] - p->cu_seqlens_q[seq];
        if (queries < 0 || queries > p->context_lens[seq]) return -2;
        const int64_t tiles = (p->context_lens[seq] + TILE - 1) / TILE;
        const int64_t groups = (num_rows(p, seq) + MAX_ROWS - 1) / MAX_ROWS;
        plan->max_tiles = tiles > plan->max_tiles ? tiles : plan->max_tiles;
        plan->max_row_groups = groups > plan->max_row_groups ? groups : plan->max_row_groups;
    }
    /* With plenty of heads each unit stores and attends in one pass; otherwise, all must be stored before the rows of
     * one head are shared out. */
    plan->heads_each = 1;
    if (plan->max_row_groups <= 1 && p->num_seqs > 0) {
        /* Nothing but next tokens: as many heads at a time as leave every thread some units. */
        const int64_t parts = (4 * (int64_t)num_threads + p->num_seqs - 1) / p->num_seqs;
        plan->heads_each = parts < p->num_kv_heads ? (p->num_kv_heads + parts - 1) / parts : 1;
    }
    plan->needs_two_passes = p->num_seqs * p->num_kv_heads < 4 * (int64_t)num_threads && plan->max_row_groups > 1;
    return 0;
}

static void attend_group(const attention_step *p, scratch *s, int64_t seq, int64_t kv_head, int64_t row) {
    const int64_t left = num_rows(p, seq) - row;
    const variant *kernel = variants[p->is_bfloat16 ? BFLOAT16 : FLOAT32];
    if (left > 0) kernel->attend_rows(p, s, seq, kv_head, row, left < MAX_ROWS ? left : MAX_ROWS);
}

static void attend_sequence(const attention_step *p, scratch *s, int64_t seq, int64_t first_head, int64_t heads) {
    const variant *kernel = variants[p->is_bfloat16 ? BFLOAT16 : FLOAT32];
    const int64_t group = p->num_heads / p->num_kv_heads;
    if (group <= MAX_ROWS && num_rows(p, seq) == group) {
        kernel->decode_heads(p, s, seq, first_head, heads, group);
        return;
    }
    for (int64_t head = first_head; head < first_head + heads; head++)
        for (int64_t row = 0; row < num_rows(p, seq); row += MAX_ROWS) attend_group(p, s, seq, head, row);
}

/* One unit is a sequence and some of its kv heads; in the pass that only attends, a group of one head's rows. */
int quill_attention_pass(const attention_step *p, const attention_plan *plan, int pass, atomic_llong *next) {
    const variant *kernel = variants[p->is_bfloat16 ? BFLOAT16 : FLOAT32];
    const int64_t each = pass == ATTEND ? 1 : plan->heads_each, parts = pass == ATTEND ? plan->max_row_groups : 1;
    const int64_t ranges = (p->num_kv_heads + each - 1) / each, units = p->num_seqs * ranges * parts;
    scratch s;
    if (!make_scratch(p, plan->max_tiles, each, &s)) return -1;
    for (;;) {
        const int64_t unit = atomic_fetch_add(next, 1);
        if (unit >= units) return 0;
        const int64_t seq = unit / parts / ranges, head = unit / parts % ranges * each;
        const int64_t left = p->num_kv_heads - head, heads = left < each ? left : each;
        if (pass == ATTEND) {
            attend_group(p, &s, seq, head, unit % parts * MAX_ROWS);
            continue;
        }
        for (int64_t i = head; i < head + heads; i++) kernel->store_head(p, seq, i);
        if (pass == STORE_AND_ATTEND) attend_sequence(p, &s, seq, head, heads);
    }
}

typedef struct {
    const attention_step *step;
    attention_plan plan;
    int pass;
    atomic_llong next;
    atomic_int failed;
} job;

static void work(void *data) {
    job *j = data;
    if (quill_attention_pass(j->step, &j->plan, j->pass, &j->next) != 0) atomic_store(&j->failed, 1);
}

static int run(job *j, int pass) {
    j->pass = pass;
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
    job j = {.step = p};
    const int status = quill_plan_attention(p, p->num_threads, &j.plan);
    if (status != 0) return status;
    if (!j.plan.needs_two_passes) return run(&j, STORE_AND_ATTEND);
    return run(&j, STORE) != 0 ? -1 : run(&j, ATTEND);
}
