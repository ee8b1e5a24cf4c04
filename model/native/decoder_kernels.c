/* The decoder's kernels for every type of weights and every instruction set. */

#include "decoder_types.h"

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
row_kernels quill_row_kernels[3];
tile_kernel quill_tile_kernels[3];

void quill_choose_decoder(int most) {
    for (int weights = FLOAT32; weights <= INT8; weights++) {
        const int element = weights == FLOAT32 ? FLOAT32 : BFLOAT16;
        quill_row_kernels[weights] = ROW_VARIANTS[element][quill_instruction_set(element, most)];
        quill_tile_kernels[weights] = TILE_VARIANTS[weights][quill_instruction_set(weights, most)];
    }
}

/* Rows that share one pass over weights of this type. */
int quill_tile_rows(int weights) { return quill_tile_kernels[weights].most_rows; }
