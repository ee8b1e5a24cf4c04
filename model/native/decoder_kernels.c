/* The decoder's kernels for every type of weights and every instruction set. */

#include "compact.h"

/* The first n weights of a compact panel's feature `lane`. */
static void unpack_compact_row(const compact_panel *p, int64_t lane, float *out, int64_t n) {
    const int half = (int)(lane / TILE), place = (int)(lane % TILE * 2);
    for (int64_t i = 0; i < n; i++)
        out[i] = bf16_at(compact_weight(p, i / 4, (int)(i / 2 % 2 * 2 + half), place + (int)(i % 2)), 0);
    for (int64_t i = 0; i < p->count; i++)
        if (p->strays[i].place % PANEL == lane) out[p->strays[i].place / PANEL] = p->strays[i].weight;
}

/* One output feature's weights as floats; the padding up to a whole panel becomes zero. */
static void unpack_row(const matrix *m, int weights, int64_t feature, float *out, int64_t n) {
    const int64_t pair = pair_of(weights), panel = feature / PANEL;
    const uint32_t *at = (const uint32_t *)m->weights + panel * m->steps * PANEL + feature % PANEL;
    if (m->starts) {
        const compact_panel p = read_panel(m, panel);
        if (p.count >= 0) {
            unpack_compact_row(&p, feature % PANEL, out, n);
            for (int64_t i = n; i % PANEL; i++) out[i] = 0;
            return;
        }
        at = (const uint32_t *)p.groups + feature % PANEL;
    }
    for (int64_t i = 0; i < (n + PANEL - 1) / PANEL * PANEL; i++) {
        const uint32_t word = i < n ? at[i / pair * PANEL] : 0;
        const union { uint32_t u; float f; } value = {word};
        out[i] = weights == FLOAT32 ? value.f : bf16_at(word, i % 2);
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
#define KERNELS "decoder_rows.h"
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
        {2, multiply_tile_bf16_avx2},
        {12, multiply_tile_bf16_avx512, multiply_compact_avx512},
#endif
    },
    {
        {2, multiply_tile_int8_base},
#ifdef HAVE_X86_VARIANTS
        {2, multiply_tile_int8_avx2}, {12, multiply_tile_int8_avx512},
#endif
    },
};
row_kernels quill_row_kernels[3];
tile_kernel quill_tile_kernels[3];

void quill_choose_decoder(int most) {
    for (int weights = FLOAT32; weights <= INT8; weights++) {
        const int element = weights == FLOAT32 ? FLOAT32 : BFLOAT16;
        quill_row_kernels[weights] = ROW_VARIANTS[element][quill_instruction_set(element, most)];
        quill_tile_kernels[weights] = TILE_VARIANTS[weights][quill_instruction_set(weights, most)];
    }
}

/* Whether compact weights are read as they are here. */
int quill_reads_compact(void) { return quill_tile_kernels[BFLOAT16].multiply_compact != 0; }

/* Rows that share one pass over weights of this type. */
int quill_tile_rows(int weights) { return quill_tile_kernels[weights].most_rows; }
