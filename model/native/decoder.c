/* The forward pass of a decoder-only transformer on the CPU: a step's embeddings and layers in one parallel region,
 * its logits in another, so that a step of one token costs little more than reading the weights once.
 *
 * Every row's arithmetic runs in one fixed order, whatever rows share the step, the tile or the threads.
 */

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#include "compact.h"
#include "paged_step.h"

#define SPINS 2000 /* looks at a barrier before the core is left to others: about the time that waking up takes */

typedef struct {
    const decoder *model;
    const decoder_step *step;
    const product *alone; /* only this product */
    attention_step attention;
    attention_plan plan;
    atomic_llong next; /* the next unit of the phase under way */
    atomic_int joined, arrived, phase, sleeping, failed;
} job;

/* One of the threads of a job: how many there are, and its place among them. */
typedef struct {
    int threads, place;
} seat;

#ifdef __linux__
static void sleep_until_changed(atomic_int *value, int old) { syscall(SYS_futex, value, FUTEX_WAIT_PRIVATE, old, 0, 0, 0); }
static void wake_all(atomic_int *value) { syscall(SYS_futex, value, FUTEX_WAKE_PRIVATE, INT32_MAX, 0, 0, 0); }
#else
static void sleep_until_changed(atomic_int *value, int old) { if (atomic_load(value) == old) sched_yield(); }
static void wake_all(atomic_int *value) { (void)value; }
#endif

/* Wait until every thread has finished the phase; then units are counted from 0 again. A thread that waits for one whose
 * core is taken goes to sleep, so that it does not take the core of a third. */
static void finish_phase(job *j, seat s) {
    const int phase = atomic_load(&j->phase);
    if (atomic_fetch_add(&j->arrived, 1) == s.threads - 1) {
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

/* A panel of a product, as the kernels are to read it: compact, or `panel` of `plain`. */
typedef struct {
    int is_compact;
    compact_panel compact;
    uint32_t *unpacked;
    int64_t panel;
    product plain;
    matrix alone;
} panel_source;

/* From now on the panel is read from `words`, laid out as matmul.h wants it. */
static void read_plain(panel_source *s, const void *words) {
    s->is_compact = 0;
    s->alone = (matrix){.weights = words, .panels = 1, .steps = s->plain.matrix->steps};
    s->plain.matrix = &s->alone;
    s->panel = 0;
}

/* Compact weights are unpacked where there is more than one tile, and where no kernel reads them. Returns -1 when memory
 * ran out. */
static int open_panel(panel_source *s, const tile_kernel *kernel, const product *p, int64_t panel, int64_t tiles) {
    const matrix *m = p->matrix;
    *s = (panel_source){.panel = panel, .plain = *p};
    if (!m->starts) return 0;
    s->compact = read_panel(m, panel);
    if (s->compact.count < 0) {
        read_plain(s, s->compact.groups);
        return 0;
    }
    s->is_compact = 1;
    if (kernel->multiply_compact && tiles == 1) return 0;
    s->unpacked = quill_arena(sizeof(uint32_t) * (size_t)(m->steps * PANEL));
    if (!s->unpacked) return -1;
    if (!kernel->multiply_compact) {
        unpack_panel(&s->compact, s->unpacked);
        read_plain(s, s->unpacked);
    }
    return 0;
}

static void multiply_rows(panel_source *s, const tile_kernel *kernel, const product *p, int64_t first, int count,
                          float *sums, coming next) {
    if (s->is_compact) {
        kernel->multiply_compact(p, &s->compact, first, count, sums, s->unpacked, next);
        if (s->unpacked) read_plain(s, s->unpacked);
    } else {
        kernel->multiply_tile(&s->plain, s->panel, first, count, sums, next);
    }
    if (p->matrix->starts) add_strays(p, &s->compact, first, count, sums);
}

/* The panel that a thread begins with in a product; null where it has none. */
static const char *first_panel(const matrix *m, seat s) {
    return m && s.place < m->panels ? panel_at(m, s.place) : 0;
}

/* Units are panels, or a panel's share of the rows where panels are few for the threads. A thread takes its next unit
 * before it computes one, so that the last of a panel's loads can be followed by the first of the next one's: also
 * across phases, while threads wait for each other or do what needs no weights. */
static void multiply(job *j, seat s, const product *p) {
    const tile_kernel *kernel = &quill_tile_kernels[j->model->weights];
    const row_kernels *rows = &quill_row_kernels[j->model->weights];
    panel_source source;
    const int64_t panels = p->matrix->panels, most = kernel->most_rows;
    const int64_t share = panels < 8 * (int64_t)s.threads && p->rows > 4 * most ? 4 * most : p->rows;
    const int64_t shares = share ? (p->rows + share - 1) / share : 0, units = panels * shares;
    float sums[MAX_TILE_ROWS * PANEL] __attribute__((aligned(64)));
    for (int64_t unit = s.place, later; unit < units; unit = later) {
        const int64_t panel = unit / shares, begin = unit % shares * share;
        later = s.threads + atomic_fetch_add(&j->next, 1);
        coming next = {later < units ? panel_at(p->matrix, later / shares) : first_panel(p->next, s), 0};
        const int64_t left = p->rows - begin, here = left < share ? left : share;
        /* Tiles of nearly equal height: a low one costs almost as much as a full one. */
        const int64_t tiles = (here + most - 1) / most;
        if (open_panel(&source, kernel, p, panel, tiles) != 0) {
            atomic_store(&j->failed, 1);
            continue;
        }
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t first = begin + here * tile / tiles, end = begin + here * (tile + 1) / tiles;
            const int count = (int)(end - first);
            multiply_rows(&source, kernel, p, first, count, sums, next);
            next.is_resident = 1;
            rows->finish_tile(p, panel, first, count, sums);
        }
    }
    finish_phase(j, s);
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
    quill_row_kernels[m->weights].quantise_row((const char *)input + row * stride * (int64_t)element_size(m), n,
                                          (int8_t *)m->bytes + row * m->bytes_stride, m->row_scales + row * w->groups,
                                          m->row_starts + row * w->groups);
}

/* A product's rows in bytes, as a phase of its own; nothing unless weights have eight bits. */
static void quantise_all(job *j, seat s, const matrix *w, const void *input, int64_t stride, int64_t n,
                         int64_t rows) {
    const decoder *m = j->model;
    if (m->weights != INT8) return;
    FOR_EACH(row, rows) quantise(m, w, input, stride, n, row);
    finish_phase(j, s);
}

/* m->input = what the product `w` reads of x: normalised, or as it is where norms come after. */
static void prepare(job *j, seat s, const norm *weights, const matrix *w, int64_t rows) {
    const decoder *m = j->model;
    const row_kernels *kernels = &quill_row_kernels[m->weights];
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
    finish_phase(j, s);
}

static void normalise_in_place(job *j, seat s, const norm *weights, int64_t rows) {
    const decoder *m = j->model;
    FOR_EACH(row, rows) {
        float *x = m->x + row * m->hidden_stride;
        quill_row_kernels[m->weights].normalise(m, weights, x, x);
    }
    finish_phase(j, s);
}

static void attend(job *j, seat s, const layer *l) {
    attention_step step = j->attention;
    step.key_cache = l->key_cache;
    step.value_cache = l->value_cache;
    const int passes[2] = {j->plan.needs_two_passes ? STORE : STORE_AND_ATTEND, ATTEND};
    for (int i = 0; i <= j->plan.needs_two_passes; i++) {
        if (quill_attention_pass(&step, &j->plan, passes[i], &j->next) != 0) atomic_store(&j->failed, 1);
        finish_phase(j, s);
    }
}

/* Move the wanted rows of x and of the attention's results to the front; the others need nothing further. */
static void keep_wanted(job *j, seat s) {
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
    finish_phase(j, s);
}

static void run_layer(job *j, seat s, const layer *l, int is_last) {
    const decoder *m = j->model;
    const decoder_step *p = j->step;
    int64_t rows = p->num_tokens;
    prepare(j, s, m->is_norm_first ? &l->attn_norm : 0, &l->qkv, rows);
    product q = make_product(m, &l->qkv, m->input, m->hidden_stride, rows);
    q.output = m->qkv;
    q.output_stride = m->qkv_stride;
    q.next = &l->o;
    multiply(j, s, &q);
    if (m->cosine || l->q_norm) {
        FOR_EACH(row, rows) quill_row_kernels[m->weights].turn_row(m, l, p, row);
        finish_phase(j, s);
    }
    attend(j, s, l);
    if (is_last) {
        rows = p->num_rows;
        if (rows < p->num_tokens) keep_wanted(j, s);
    }
    quantise_all(j, s, &l->o, m->attended, m->q_size, m->q_size, rows);
    product o = make_product(m, &l->o, m->attended, m->q_size, rows);
    o.output = m->x;
    o.output_stride = m->hidden_stride;
    o.result = ADDED;
    o.next = &l->up;
    multiply(j, s, &o);
    if (!m->is_norm_first) normalise_in_place(j, s, &l->attn_norm, rows);

    prepare(j, s, m->is_norm_first ? &l->mlp_norm : 0, &l->up, rows);
    product up = make_product(m, &l->up, m->input, m->hidden_stride, rows);
    up.output = m->inner;
    up.output_stride = m->inner_stride;
    up.activation = m->activation;
    up.is_gated = m->is_gated;
    up.next = &l->down;
    multiply(j, s, &up);
    const int64_t inner = l->down.steps * pair_of(m->weights);
    quantise_all(j, s, &l->down, m->inner, m->inner_stride, inner, rows);
    product down = make_product(m, &l->down, m->inner, m->inner_stride, rows);
    down.output = m->x;
    down.output_stride = m->hidden_stride;
    down.result = ADDED;
    down.next = is_last ? &m->head : &l[1].qkv;
    multiply(j, s, &down);
    if (!m->is_norm_first) normalise_in_place(j, s, &l->mlp_norm, rows);
}

static seat take_seat(job *j) {
    return (seat){quill_team_size ? quill_team_size() : 1, atomic_fetch_add(&j->joined, 1)};
}

static void run_step(void *data) {
    job *j = data;
    const decoder *m = j->model;
    const decoder_step *p = j->step;
    const seat s = take_seat(j);
    const row_kernels *kernels = &quill_row_kernels[m->weights];
    FOR_EACH(row, p->num_tokens) kernels->embed_row(m, p, row);
    finish_phase(j, s);
    for (int64_t i = 0; i < m->num_layers; i++) run_layer(j, s, &m->layers[i], i == m->num_layers - 1);
    FOR_EACH(row, p->num_rows) {
        float *x = m->x + row * m->hidden_stride;
        if (m->final_norm.scale) kernels->normalise(m, &m->final_norm, x, x);
        kernels->narrow_row(x, (char *)p->output + row * m->hidden_stride * (int64_t)element_size(m), m->hidden_stride);
    }
    finish_phase(j, s);
}

static void run_logits(void *data) {
    job *j = data;
    const seat s = take_seat(j);
    quantise_all(j, s, &j->model->head, j->step->output, j->model->hidden_stride, j->model->hidden_size,
                 j->step->num_rows);
    multiply(j, s, j->alone);
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
