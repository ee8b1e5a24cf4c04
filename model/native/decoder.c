/* The forward pass of a decoder-only transformer on the CPU: a step's embeddings, layers and logits in one parallel
 * region each, so that a step of one token costs little more than reading the weights once.
 *
 * Every row's arithmetic runs in one fixed order, whatever rows share the step, the tile or the threads.
 */

#ifdef __linux__
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#include "paged_step.h"

#define PANEL 32         /* output features that are computed together */
#define GROUP 128        /* inputs that share a scale in eight bits */
#define MAX_TILE_ROWS 12 /* rows that are computed together, at most */
#define MAX_HEAD_DIM 512
#define SPINS 2000 /* looks at a barrier before the core is left to others: about the time that waking up takes */

typedef int8_t v16b_u __attribute__((vector_size(16), aligned(1), may_alias));

enum { ELEMENTS, ADDED, FLOATS };

/* Packed weights of one product; see matmul.h and matmul_int8.h. `bias` is [panels * 32] or null. */
typedef struct {
    const void *weights;
    const float *scales, *bias;
    int64_t panels, steps, groups;
} matrix;

typedef struct {
    const float *scale, *bias; /* [hidden_stride]; bias may be null */
} norm;

typedef struct {
    matrix qkv, o, up, down;
    norm attn_norm, mlp_norm;
    const float *q_norm, *k_norm; /* [head_dim] or null */
    void *key_cache, *value_cache;
} layer;

/* A model and the memory of its steps. Mirrored by `_Decoder` in model/cpu_decoder.py. Strides are in elements.
 * `embedding` [vocabulary][hidden_stride] is null when the packed head serves as one. `cosine` and `sine` are
 * [max_seq_len][angle_stride] or null, `position_table` is [max_seq_len][hidden_stride] or null. */
typedef struct {
    const layer *layers;
    matrix head;
    norm final_norm; /* scale is null without one */
    const void *embedding, *position_table;
    const float *cosine, *sine;
    float *x;                       /* [rows][hidden_stride] */
    void *input, *qkv, *attended, *inner; /* [rows][their strides] */
    void *bytes;                    /* int8: [rows][bytes_stride] */
    float *row_scales;              /* int8: [rows][most groups] */
    int32_t *row_starts;
    int64_t num_layers, hidden_size, hidden_stride, qkv_stride, q_size, inner_stride, bytes_stride, angle_stride;
    int64_t vocab_size, max_seq_len, num_heads, num_kv_heads, head_dim, block_size, window, max_rows;
    float norm_eps;
    int32_t weights, is_rms_norm, is_norm_first, is_gated, activation;
} decoder;

/* One step, mirrored by `_DecoderStep`. `rows` lists, in ascending order, whose hidden states are wanted; `output` is
 * [num_rows][hidden_stride] elements. */
typedef struct {
    const int64_t *input_ids, *positions, *rows;
    const int32_t *cu_seqlens_q, *context_lens, *block_tables;
    void *output;
    int64_t num_tokens, num_rows, num_seqs, max_blocks;
    int32_t num_threads;
} decoder_step;

typedef struct {
    const matrix *matrix;
    const void *input;
    int64_t stride; /* of the input, in 32-bit steps */
    const float *row_scales;
    const int32_t *row_starts;
    void *output;
    int64_t output_stride, rows;
    int result, activation, is_gated;
} product;

static inline int64_t pair_of(int weights) { return weights == FLOAT32 ? 1 : weights == BFLOAT16 ? 2 : 4; }

/* One output feature's weights as floats; the padding up to a whole panel becomes zero. */
static void unpack_row(const matrix *m, int weights, int64_t feature, float *out, int64_t n) {
    const int64_t pair = pair_of(weights), panel = feature / PANEL;
    const uint32_t *at = (const uint32_t *)m->weights + panel * m->steps * PANEL + feature % PANEL;
    for (int64_t i = 0; i < (n + PANEL - 1) / PANEL * PANEL; i++) {
        const uint32_t word = i < n ? at[i / pair * PANEL] : 0;
        const union { uint32_t u; float f; } value = {
            weights == FLOAT32 ? word : i % 2 ? word & 0xffff0000u : word << 16};
        out[i] = value.f;
        if (weights == INT8 && i < n) {
            const float scale = m->scales[(panel * m->groups + i / GROUP) * PANEL + feature % PANEL];
            out[i] = (float)((int)(word >> i % 4 * 8 & 0xff) - 128) * scale;
        } else if (weights == INT8) {
            out[i] = 0;
        }
    }
}

#define KERNELS "matmul.h"
#include "variants.h"
#define KERNELS "decoder.h"
#include "variants.h"

static inline __attribute__((always_inline)) v16i dot_int8(v16i acc, v16u weights, uint32_t scalar) {
    for (int byte = 0; byte < 4; byte++)
        acc += (v16i)(weights >> 8 * byte & 0xff) * (int32_t)(int8_t)(scalar >> 8 * byte);
    return acc;
}

#define DOT_INT8 dot_int8
#define ROWS_INT8 2
#define NAME(x) x##_int8_base
#include "matmul_int8.h"
#undef NAME
#ifdef HAVE_X86_VARIANTS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define NAME(x) x##_int8_avx2
#include "matmul_int8.h"
#undef NAME
#pragma GCC pop_options
#undef DOT_INT8
#undef ROWS_INT8
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#define DOT_INT8(acc, w, s) \
    ((v16i)_mm512_dpbusd_epi32((__m512i)(acc), (__m512i)(w), _mm512_set1_epi32((int32_t)(s))))
#define ROWS_INT8 12
#define NAME(x) x##_int8_avx512
#include "matmul_int8.h"
#undef NAME
#pragma GCC pop_options
#endif
#undef DOT_INT8
#undef ROWS_INT8

typedef struct {
    void (*embed_row)(const decoder *, const decoder_step *, int64_t);
    void (*normalise)(const decoder *, const norm *, const float *, float *);
    void (*narrow_row)(const float *, void *, int64_t);
    void (*quantise_row)(const void *, int64_t, int8_t *, float *, int32_t *);
    void (*turn_row)(const decoder *, const layer *, const decoder_step *, int64_t);
    void (*finish_tile)(const product *, int64_t, int64_t, int, const float *);
} row_kernels;

typedef struct {
    int most_rows;
    void (*multiply_tile)(const product *, int64_t, int64_t, int, float *);
} tile_kernel;

#define ROW_KERNELS(s) {embed_row_##s, normalise_##s, narrow_row_##s, quantise_row_##s, turn_row_##s, finish_tile_##s}
static const row_kernels ROW_VARIANTS[2][3] = {
    {
        ROW_KERNELS(f32_base),
#ifdef HAVE_X86_VARIANTS
        ROW_KERNELS(f32_avx2), ROW_KERNELS(f32_avx512),
#endif
    },
    {
        ROW_KERNELS(bf16_base),
#ifdef HAVE_X86_VARIANTS
        ROW_KERNELS(bf16_avx2), ROW_KERNELS(bf16_avx512),
#endif
    },
};
static const tile_kernel TILE_VARIANTS[3][3] = {
    {
        {2, multiply_tile_f32_base},
#ifdef HAVE_X86_VARIANTS
        {2, multiply_tile_f32_avx2}, {12, multiply_tile_f32_avx512},
#endif
    },
    {
        {2, multiply_tile_bf16_base},
#ifdef HAVE_X86_VARIANTS
        {2, multiply_tile_bf16_avx2}, {12, multiply_tile_bf16_avx512},
#endif
    },
    {
        {2, multiply_tile_int8_base},
#ifdef HAVE_X86_VARIANTS
        {2, multiply_tile_int8_avx2}, {12, multiply_tile_int8_avx512},
#endif
    },
};
static row_kernels row_variants[3]; /* by the weights' type */
static tile_kernel tile_variants[3];

void quill_choose_decoder(int most) {
    for (int weights = FLOAT32; weights <= INT8; weights++) {
        const int element = weights == FLOAT32 ? FLOAT32 : BFLOAT16;
        row_variants[weights] = ROW_VARIANTS[element][quill_instruction_set(element, most)];
        tile_variants[weights] = TILE_VARIANTS[weights][quill_instruction_set(weights, most)];
    }
}

/* Rows that share one pass over weights of this type. */
int quill_tile_rows(int weights) { return tile_variants[weights].most_rows; }

/* Ask for huge pages behind [address, address + size), where the system knows them. */
void quill_huge_pages(void *address, int64_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t first = ((uintptr_t)address + 4095) / 4096 * 4096;
    const uintptr_t last = ((uintptr_t)address + (uintptr_t)size) / 4096 * 4096;
    if (last > first) madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
    (void)address, (void)size;
#endif
}

typedef struct {
    const decoder *model;
    const decoder_step *step;
    const product *alone; /* only this product */
    attention_step attention;
    attention_plan plan;
    atomic_llong next; /* the next unit of the phase under way */
    atomic_int arrived, phase, sleeping, failed;
} job;

#ifdef __linux__
static void sleep_until_changed(atomic_int *value, int old) { syscall(SYS_futex, value, FUTEX_WAIT_PRIVATE, old, 0, 0, 0); }
static void wake_all(atomic_int *value) { syscall(SYS_futex, value, FUTEX_WAKE_PRIVATE, INT32_MAX, 0, 0, 0); }
#else
static void sleep_until_changed(atomic_int *value, int old) { if (atomic_load(value) == old) sched_yield(); }
static void wake_all(atomic_int *value) { (void)value; }
#endif

/* Wait until every thread has finished the phase; then units are counted from 0 again. A thread that waits for one whose
 * core is taken goes to sleep, so that it does not take the core of a third. */
static void finish_phase(job *j, int threads) {
    const int phase = atomic_load(&j->phase);
    if (atomic_fetch_add(&j->arrived, 1) == threads - 1) {
        atomic_store(&j->arrived, 0);
        atomic_store(&j->next, 0);
        atomic_store(&j->phase, phase + 1);
        if (atomic_load(&j->sleeping)) wake_all(&j->phase);
        return;
    }
    for (int spins = 0; spins < SPINS; spins++) {
        if (atomic_load_explicit(&j->phase, memory_order_acquire) != phase) return;
#ifdef HAVE_X86_VARIANTS
        _mm_pause();
#endif
    }
    atomic_fetch_add(&j->sleeping, 1);
    while (atomic_load(&j->phase) == phase) sleep_until_changed(&j->phase, phase);
    atomic_fetch_sub(&j->sleeping, 1);
}

#define FOR_EACH(unit, units)                                                                \
    for (int64_t unit = atomic_fetch_add(&j->next, 1), last_unit = (units); unit < last_unit; \
         unit = atomic_fetch_add(&j->next, 1))

/* Units are panels, or a panel's share of the rows where panels are few for the threads. */
static void multiply(job *j, int threads, const product *p) {
    const tile_kernel *kernel = &tile_variants[j->model->weights];
    const row_kernels *rows = &row_variants[j->model->weights];
    const int64_t panels = p->matrix->panels, most = kernel->most_rows;
    const int64_t share = panels < 8 * (int64_t)threads && p->rows > 4 * most ? 4 * most : p->rows;
    const int64_t shares = share ? (p->rows + share - 1) / share : 0;
    float sums[MAX_TILE_ROWS * PANEL] __attribute__((aligned(64)));
    FOR_EACH(unit, panels * shares) {
        const int64_t panel = unit / shares, begin = unit % shares * share;
        const int64_t left = p->rows - begin, here = left < share ? left : share;
        /* Tiles of nearly equal height: a low one costs almost as much as a full one. */
        const int64_t tiles = (here + most - 1) / most;
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t first = begin + here * tile / tiles, end = begin + here * (tile + 1) / tiles;
            kernel->multiply_tile(p, panel, first, (int)(end - first), sums);
            rows->finish_tile(p, panel, first, (int)(end - first), sums);
        }
    }
    finish_phase(j, threads);
}

static inline size_t element_size(const decoder *m) { return m->weights == FLOAT32 ? 4 : 2; }

/* The product of rows of elements, or of their bytes. */
static product make_product(const decoder *m, const matrix *w, const void *input, int64_t stride, int64_t rows) {
    product p = {.matrix = w, .rows = rows, .activation = NO_ACTIVATION};
    const int is_int8 = m->weights == INT8;
    p.input = is_int8 ? m->bytes : input;
    p.stride = is_int8 ? m->bytes_stride / 4 : stride * (int64_t)element_size(m) / 4;
    p.row_scales = m->row_scales;
    p.row_starts = m->row_starts;
    return p;
}

static void quantise(const decoder *m, const matrix *w, const void *input, int64_t stride, int64_t n, int64_t row) {
    row_variants[m->weights].quantise_row((const char *)input + row * stride * (int64_t)element_size(m), n,
                                          (int8_t *)m->bytes + row * m->bytes_stride, m->row_scales + row * w->groups,
                                          m->row_starts + row * w->groups);
}

/* A product's rows in bytes, as a phase of its own; nothing unless weights have eight bits. */
static void quantise_all(job *j, int threads, const matrix *w, const void *input, int64_t stride, int64_t n,
                         int64_t rows) {
    const decoder *m = j->model;
    if (m->weights != INT8) return;
    FOR_EACH(row, rows) quantise(m, w, input, stride, n, row);
    finish_phase(j, threads);
}

/* m->input = what the product `w` reads of x: normalised, or as it is where norms come after. */
static void prepare(job *j, int threads, const norm *weights, const matrix *w, int64_t rows) {
    const decoder *m = j->model;
    const row_kernels *kernels = &row_variants[m->weights];
    FOR_EACH(row, rows) {
        const float *x = m->x + row * m->hidden_stride;
        char *out = (char *)m->input + row * m->hidden_stride * (int64_t)element_size(m);
        if (weights) {
            float *normal = quill_arena(sizeof(float) * (size_t)m->hidden_stride);
            if (!normal) {
                atomic_store(&j->failed, 1);
                continue;
            }
            kernels->normalise(m, weights, x, normal);
            x = normal;
        }
        kernels->narrow_row(x, out, m->hidden_stride);
        if (m->weights == INT8) quantise(m, w, m->input, m->hidden_stride, m->hidden_size, row);
    }
    finish_phase(j, threads);
}

static void normalise_in_place(job *j, int threads, const norm *weights, int64_t rows) {
    const decoder *m = j->model;
    FOR_EACH(row, rows) {
        float *x = m->x + row * m->hidden_stride;
        row_variants[m->weights].normalise(m, weights, x, x);
    }
    finish_phase(j, threads);
}

static void attend(job *j, int threads, const layer *l) {
    attention_step step = j->attention;
    step.key_cache = l->key_cache;
    step.value_cache = l->value_cache;
    const int passes[2] = {j->plan.needs_two_passes ? STORE : STORE_AND_ATTEND, ATTEND};
    for (int i = 0; i <= j->plan.needs_two_passes; i++) {
        if (quill_attention_pass(&step, &j->plan, passes[i], &j->next) != 0) atomic_store(&j->failed, 1);
        finish_phase(j, threads);
    }
}

/* Move the wanted rows of x and of the attention's results to the front; the others need nothing further. */
static void keep_wanted(job *j, int threads) {
    const decoder *m = j->model;
    const decoder_step *p = j->step;
    FOR_EACH(unit, 1) {
        (void)unit;
        const size_t wide = sizeof(float) * (size_t)m->hidden_stride, narrow = element_size(m) * (size_t)m->q_size;
        for (int64_t i = 0; i < p->num_rows; i++) {
            if (p->rows[i] == i) continue;
            memcpy((char *)m->x + i * wide, (char *)m->x + p->rows[i] * wide, wide);
            memcpy((char *)m->attended + i * narrow, (char *)m->attended + p->rows[i] * narrow, narrow);
        }
    }
    finish_phase(j, threads);
}

static void run_layer(job *j, int threads, const layer *l, int is_last) {
    const decoder *m = j->model;
    const decoder_step *p = j->step;
    int64_t rows = p->num_tokens;
    prepare(j, threads, m->is_norm_first ? &l->attn_norm : 0, &l->qkv, rows);
    product q = make_product(m, &l->qkv, m->input, m->hidden_stride, rows);
    q.output = m->qkv;
    q.output_stride = m->qkv_stride;
    multiply(j, threads, &q);
    if (m->cosine || l->q_norm) {
        FOR_EACH(row, rows) row_variants[m->weights].turn_row(m, l, p, row);
        finish_phase(j, threads);
    }
    attend(j, threads, l);
    if (is_last) {
        rows = p->num_rows;
        if (rows < p->num_tokens) keep_wanted(j, threads);
    }
    quantise_all(j, threads, &l->o, m->attended, m->q_size, m->q_size, rows);
    product o = make_product(m, &l->o, m->attended, m->q_size, rows);
    o.output = m->x;
    o.output_stride = m->hidden_stride;
    o.result = ADDED;
    multiply(j, threads, &o);
    if (!m->is_norm_first) normalise_in_place(j, threads, &l->attn_norm, rows);

    prepare(j, threads, m->is_norm_first ? &l->mlp_norm : 0, &l->up, rows);
    product up = make_product(m, &l->up, m->input, m->hidden_stride, rows);
    up.output = m->inner;
    up.output_stride = m->inner_stride;
    up.activation = m->activation;
    up.is_gated = m->is_gated;
    multiply(j, threads, &up);
    const int64_t inner = l->down.steps * pair_of(m->weights);
    quantise_all(j, threads, &l->down, m->inner, m->inner_stride, inner, rows);
    product down = make_product(m, &l->down, m->inner, m->inner_stride, rows);
    down.output = m->x;
    down.output_stride = m->hidden_stride;
    down.result = ADDED;
    multiply(j, threads, &down);
    if (!m->is_norm_first) normalise_in_place(j, threads, &l->mlp_norm, rows);
}

static int team_size(void) { return quill_team_size ? quill_team_size() : 1; }

static void run_step(void *data) {
    job *j = data;
    const decoder *m = j->model;
    const decoder_step *p = j->step;
    const int threads = team_size();
    const row_kernels *kernels = &row_variants[m->weights];
    FOR_EACH(row, p->num_tokens) kernels->embed_row(m, p, row);
    finish_phase(j, threads);
    for (int64_t i = 0; i < m->num_layers; i++) run_layer(j, threads, &m->layers[i], i == m->num_layers - 1);
    FOR_EACH(row, p->num_rows) {
        float *x = m->x + row * m->hidden_stride;
        if (m->final_norm.scale) kernels->normalise(m, &m->final_norm, x, x);
        kernels->narrow_row(x, (char *)p->output + row * m->hidden_stride * (int64_t)element_size(m), m->hidden_stride);
    }
    finish_phase(j, threads);
}

static void run_logits(void *data) {
    job *j = data;
    const int threads = team_size();
    quantise_all(j, threads, &j->model->head, j->step->output, j->model->hidden_stride, j->model->hidden_size,
                 j->step->num_rows);
    multiply(j, threads, j->alone);
}

static int run(job *j, void (*work)(void *), int num_threads) {
    if (quill_run_parallel && quill_team_size && num_threads > 1)
        quill_run_parallel(work, j, (unsigned)num_threads, 0);
    else
        work(j);
    return atomic_load(&j->failed) ? -1 : 0;
}

static int is_sound(const decoder *m, const decoder_step *p) {
    if (p->num_tokens > m->max_rows || p->num_rows > p->num_tokens || p->cu_seqlens_q[p->num_seqs] != p->num_tokens)
        return 0;
    for (int64_t i = 0; i < p->num_tokens; i++)
        if (p->input_ids[i] < 0 || p->input_ids[i] >= m->vocab_size || p->positions[i] < 0 ||
            p->positions[i] >= m->max_seq_len)
            return 0;
    for (int64_t i = 0; i < p->num_rows; i++)
        if (p->rows[i] < (i ? p->rows[i - 1] + 1 : 0) || p->rows[i] >= p->num_tokens) return 0;
    return 1;
}

/* Run a step: its keys and values into the cache, the wanted rows' hidden states into `output`. Returns 0; -1 when
 * memory ran out; -2, having done nothing, for a step that does not fit the model. */
int quill_decoder_forward(const decoder *m, const decoder_step *p) {
    if (!is_sound(m, p)) return -2;
    job j = {.model = m, .step = p};
    const char *qkv = m->qkv;
    const int64_t size = (int64_t)element_size(m), kv_size = m->num_kv_heads * m->head_dim;
    j.attention = (attention_step){
        .query = qkv,
        .key = qkv + m->q_size * size,
        .value = qkv + (m->q_size + kv_size) * size,
        .key_cache = m->layers[0].key_cache,
        .value_cache = m->layers[0].value_cache,
        .output = m->attended,
        .query_stride = m->qkv_stride,
        .key_stride = m->qkv_stride,
        .value_stride = m->qkv_stride,
        .cu_seqlens_q = p->cu_seqlens_q,
        .context_lens = p->context_lens,
        .block_tables = p->block_tables,
        .num_seqs = p->num_seqs,
        .max_blocks = p->max_blocks,
        .num_heads = m->num_heads,
        .num_kv_heads = m->num_kv_heads,
        .head_dim = m->head_dim,
        .block_size = m->block_size,
        .window = m->window,
        .scale = 1.0f / sqrtf((float)m->head_dim),
        .is_bfloat16 = m->weights != FLOAT32,
        .num_threads = p->num_threads,
    };
    const int status = quill_plan_attention(&j.attention, p->num_threads, &j.plan);
    return status != 0 ? status : run(&j, run_step, p->num_threads);
}

/* logits [num_rows][panels * 32] of the hidden states `output` of `p`, which says nothing else. Returns 0. */
int quill_decoder_logits(const decoder *m, const decoder_step *p, float *logits) {
    if (p->num_rows > m->max_rows) return -2;
    product head = make_product(m, &m->head, p->output, m->hidden_stride, p->num_rows);
    head.output = logits;
    head.output_stride = m->head.panels * PANEL;
    head.result = FLOATS;
    job j = {.model = m, .step = p, .alone = &head};
    return run(&j, run_logits, p->num_threads);
}

/* Packing. `source` is [features][columns] in float32, or bfloat16 if so marked; `order` names, for each packed feature,
 * the source's, or -1 for none. */
typedef struct {
    const void *source;
    const int64_t *order;
    void *packed;
    float *scales;
    int64_t columns, panels, steps, groups;
    int32_t weights, is_bfloat16, num_threads;
} packing;

typedef struct {
    const packing *p;
    atomic_llong next;
} packing_job;

static float source_value(const packing *p, int64_t feature, int64_t column) {
    if (feature < 0 || column >= p->columns) return 0;
    const int64_t at = feature * p->columns + column;
    if (!p->is_bfloat16) return ((const float *)p->source)[at];
    const union { uint32_t u; float f; } value = {(uint32_t)((const uint16_t *)p->source)[at] << 16};
    return value.f;
}

/* A feature's words of one or two values, each PANEL words behind the last. */
static void pack_feature(const packing *p, int64_t feature, uint32_t *out) {
    const int64_t pair = pair_of(p->weights), size = 4 / pair;
    const char *row = (const char *)p->source + feature * p->columns * size;
    for (int64_t step = 0; step < p->steps; step++) {
        uint32_t word = 0;
        if (feature >= 0 && (step + 1) * pair <= p->columns)
            memcpy(&word, row + step * 4, 4);
        else if (feature >= 0)
            memcpy(&word, row + step * 4, 2);
        out[step * PANEL] = word;
    }
}

static void pack_feature_int8(const packing *p, int64_t panel, int64_t lane) {
    const int64_t feature = p->order[panel * PANEL + lane];
    uint8_t *out = (uint8_t *)p->packed + (panel * p->steps * PANEL + lane) * 4;
    for (int64_t group = 0; group < p->groups; group++) {
        const int64_t first = group * GROUP, left = p->steps * 4 - first, count = left < GROUP ? left : GROUP;
        float top = 0;
        for (int64_t i = first; i < first + count; i++) {
            const float size = fabsf(source_value(p, feature, i));
            top = size > top ? size : top;
        }
        const float inverse = top > 0 ? 127.0f / top : 0.0f;
        p->scales[(panel * p->groups + group) * PANEL + lane] = top / 127.0f;
        for (int64_t i = first; i < first + count; i++) {
            const float q = source_value(p, feature, i) * inverse;
            out[i / 4 * PANEL * 4 + i % 4] = (uint8_t)(128 + (int)(q < 0 ? q - 0.5f : q + 0.5f));
        }
    }
}

static void pack_panels(void *data) {
    packing_job *job = data;
    const packing *p = job->p;
    for (;;) {
        const int64_t panel = atomic_fetch_add(&job->next, 1);
        if (panel >= p->panels) return;
        for (int64_t lane = 0; lane < PANEL; lane++) {
            if (p->weights == INT8) {
                pack_feature_int8(p, panel, lane);
                continue;
            }
            uint32_t *out = (uint32_t *)p->packed + panel * p->steps * PANEL + lane;
            pack_feature(p, p->order[panel * PANEL + lane], out);
        }
    }
}

/* What the caller's mirrors must measure: the decoder's, a layer's, a step's, a packing's. */
int64_t quill_decoder_sizes(int which) {
    const int64_t sizes[] = {sizeof(decoder), sizeof(layer), sizeof(decoder_step), sizeof(packing)};
    return sizes[which];
}

/* Lay weights out as matmul.h and matmul_int8.h want them. The source of bfloat16 weights must be bfloat16, that of
 * float32 weights float32. */
void quill_pack(const packing *p) {
    packing_job job = {.p = p};
    if (quill_run_parallel && p->num_threads > 1)
        quill_run_parallel(pack_panels, &job, (unsigned)p->num_threads, 0);
    else
        pack_panels(&job);
}
