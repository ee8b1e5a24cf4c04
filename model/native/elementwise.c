/* CPU kernels of training that run over rows: activations, RMS norm, rotary positions. */

#include "common.h"

#define NORM_CHUNK 64 /* rows whose parts of the weight's gradient are summed in one go */
#define ROW_CHUNK 16  /* rows that a thread takes at a time */

enum { ACTIVATE, ACTIVATE_BACK, ROTATE, NORM, NORM_BACK, NUM_OPERATIONS };

/* One call. Mirrored by `_Elementwise` in model/training_kernels.py; elementwise.h and rms_norm.h say what each
 * operation reads. `output` is the input's gradient in the backward operations. */
typedef struct {
    const void *input, *output_grad;
    void *output;
    const float *weight, *cosine, *sine;
    float *scales, *weight_grads;
    int64_t rows, columns, input_stride, num_heads, length, angle_stride;
    float eps, sign;
    int32_t operation, kind, gated, is_bfloat16, num_threads;
} elementwise;

#define KERNELS "elementwise.h"
#include "variants.h"
#define KERNELS "rms_norm.h"
#include "variants.h"

typedef void (*operation)(const elementwise *, int64_t);

#define OPERATIONS(suffix) \
    { activate_##suffix, activate_back_##suffix, rotate_##suffix, norm_##suffix, norm_back_##suffix }

static const operation VARIANTS[2][3][NUM_OPERATIONS] = {
    {
        OPERATIONS(f32_base),
#ifdef HAVE_X86_VARIANTS
        OPERATIONS(f32_avx2), OPERATIONS(f32_avx512),
#endif
    },
    {
        OPERATIONS(bf16_base),
#ifdef HAVE_X86_VARIANTS
        OPERATIONS(bf16_avx2), OPERATIONS(bf16_avx512),
#endif
    },
};
static const operation *variants[2] = {VARIANTS[FLOAT32][PORTABLE], VARIANTS[BFLOAT16][PORTABLE]};

void quill_choose_elementwise(int most) {
    for (int element = FLOAT32; element <= BFLOAT16; element++)
        variants[element] = VARIANTS[element][quill_instruction_set(element, most)];
}

/* What the caller's mirror of elementwise must measure. */
int64_t quill_elementwise_size(void) { return sizeof(elementwise); }

typedef struct {
    const elementwise *call;
    int64_t units, units_each;
    atomic_llong next;
} job;

static void work(void *data) {
    job *j = data;
    const operation run = variants[j->call->is_bfloat16 ? 1 : 0][j->call->operation];
    for (;;) {
        const int64_t first = atomic_fetch_add(&j->next, j->units_each);
        if (first >= j->units) return;
        for (int64_t unit = first; unit < first + j->units_each && unit < j->units; unit++) run(j->call, unit);
    }
}

/* A unit of NORM_BACK is a chunk of rows, that of the others a row; none depends on the number of threads. */
void quill_elementwise(const elementwise *p) {
    const int by_chunk = p->operation == NORM_BACK;
    job j = {.call = p, .units = by_chunk ? (p->rows + NORM_CHUNK - 1) / NORM_CHUNK : p->rows};
    j.units_each = by_chunk ? 1 : ROW_CHUNK;
    if (quill_run_parallel && p->num_threads > 1 && j.units > j.units_each)
        quill_run_parallel(work, &j, (unsigned)p->num_threads, 0);
    else
        work(&j);
}
