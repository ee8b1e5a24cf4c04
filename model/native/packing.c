/* Laying weights out for the decoder's products. */

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "decoder_types.h"

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

/* One weight. `source` is [features][columns] in float32, or bfloat16 if so marked; `order` names, for each packed feature,
 * the source's, or -1 for none. With `sizes` [panels] each panel is made compact, at multiples of `stride` bytes, and gets
 * its size there, or -1 when memory ran out. */
typedef struct {
    const void *source;
    const int64_t *order;
    void *packed;
    float *scales;
    int64_t *sizes;
    int64_t columns, panels, steps, groups, stride;
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

static void pack_compact(const packing *p, int64_t panel) {
    const size_t size = sizeof(uint32_t) * (size_t)(p->steps * PANEL);
    uint32_t *words = quill_arena(size);
    p->sizes[panel] = -1;
    if (!words) return;
    for (int64_t lane = 0; lane < PANEL; lane++) pack_feature(p, p->order[panel * PANEL + lane], words + lane);
    p->sizes[panel] = quill_write_compact(words, p->steps, (uint8_t *)p->packed + panel * p->stride);
}

static void pack_panels(void *data) {
    packing_job *job = data;
    const packing *p = job->p;
    for (;;) {
        const int64_t panel = atomic_fetch_add(&job->next, 1);
        if (panel >= p->panels) return;
        if (p->sizes) {
            pack_compact(p, panel);
            continue;
        }
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

typedef struct {
    const char *panels;
    const int64_t *starts;
    char *out;
    int64_t stride, num_panels;
    atomic_llong next;
} gathering;

static void gather_panels(void *data) {
    gathering *g = data;
    for (int64_t i = atomic_fetch_add(&g->next, 1); i < g->num_panels; i = atomic_fetch_add(&g->next, 1))
        memcpy(g->out + g->starts[i], g->panels + i * g->stride, (size_t)(g->starts[i + 1] - g->starts[i]));
}

/* Bring panels together that begin at multiples of `stride` bytes: panel i to `out + starts[i]`, up to the next start. */
void quill_gather(const char *panels, int64_t stride, const int64_t *starts, int64_t num_panels, char *out,
                  int num_threads) {
    gathering job = {.panels = panels, .starts = starts, .out = out, .stride = stride, .num_panels = num_panels};
    if (quill_run_parallel && num_threads > 1)
        quill_run_parallel(gather_panels, &job, (unsigned)num_threads, 0);
    else
        gather_panels(&job);
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
