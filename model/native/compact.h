/* bfloat16 weights in 12 bits each, none of them rounded: a step of one row costs little more than reading the weights
 * once, so that fewer bytes are a faster step.
 *
 * Fifteen of the 256 exponents, and that of zero, cover nearly all weights of a panel. A group is two steps, 128 weights:
 * for each its sign and 7 bits of fraction as a byte, and four bits that say which of the panel's sixteen exponents it has.
 * The few weights of other exponents are zero there, and are added to a row's sums when these are complete. A panel is
 *   exponents  uint16 [32]: the sixteen, twice, in the bits where bfloat16 has them
 *   count      int32; negative in a panel that follows, after HEADER bytes, as matmul.h has it
 *   strays     [count] of those few weights; padding up to a multiple of 64 bytes
 *   groups     [steps / 2] of uint16 codes [32], bytes [4][32]: bits 4k … 4k + 3 of code i belong to byte [k][i], and k
 *              goes through the panel's halves of 16 features, first those of the group's first step
 */

#ifndef QUILL_COMPACT_H
#define QUILL_COMPACT_H

#include "decoder_types.h"

#define HEADER 128
#define HEADER_BYTES(count) ((68 + (int64_t)sizeof(stray) * (count) + 63) / 64 * 64)
#define GROUP_BYTES 192
#define EXPONENTS 16

static inline compact_panel read_panel(const matrix *m, int64_t panel) {
    const char *at = panel_at(m, panel);
    const int32_t *head = (const int32_t *)(at + sizeof(uint16_t) * 2 * EXPONENTS);
    compact_panel p = {(const uint16_t *)at, (const stray *)(head + 1), 0, head[0], m->steps / 2};
    p.groups = (const uint8_t *)at + (p.count < 0 ? HEADER : HEADER_BYTES(p.count));
    return p;
}

/* Weight i of byte row k of a group, in bfloat16. */
static inline uint16_t compact_weight(const compact_panel *p, int64_t group, int k, int i) {
    const uint8_t *at = p->groups + group * GROUP_BYTES;
    const uint8_t byte = at[64 + 32 * k + i];
    const int code = ((const uint16_t *)at)[i] >> 4 * k & 15;
    return (uint16_t)((byte & 0x80) << 8 | (byte & 0x7f) | p->exponents[code]);
}

static inline float bf16_at(uint32_t word, int is_second) {
    const union { uint32_t u; float f; } value = {is_second ? word & 0xffff0000u : word << 16};
    return value.f;
}

/* Add what a panel's strays contribute to sums[row][32] of `count` rows from `first` on. */
static inline void add_strays(const product *p, const compact_panel *weights, int64_t first, int count, float *sums) {
    for (int64_t i = 0; i < weights->count; i++) {
        const stray s = weights->strays[i];
        const int64_t column = s.place / PANEL, lane = s.place % PANEL;
        const uint32_t *x = (const uint32_t *)p->input + first * p->stride + column / 2;
        for (int row = 0; row < count; row++)
            sums[row * PANEL + lane] += s.weight * bf16_at(x[row * p->stride], column % 2);
    }
}

/* The panel as matmul.h wants it, [steps][32] words, with zeros for its strays. */
static inline void unpack_panel(const compact_panel *p, uint32_t *out) {
    for (int64_t group = 0; group < p->num_groups; group++)
        for (int k = 0; k < 4; k++)
            for (int i = 0; i < 2 * TILE; i++)
                ((uint16_t *)out)[(group * 4 + k) * 2 * TILE + i] = compact_weight(p, group, k, i);
}

#ifdef HAVE_X86_VARIANTS
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")

/* Byte row K of the group at `at`, as 32 bfloat16. The upper bit of a five-bit place in `exponents` does not matter. */
#define UNPACK(K)                                                                                                  \
    _mm512_ternarylogic_epi32(_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(at + 64 + 32 * (K)))),      \
                              _mm512_set1_epi16((short)0x807f),                                                    \
                              _mm512_permutexvar_epi16((K) ? _mm512_srli_epi16(codes, 4 * (K)) : codes, exponents), \
                              0xea) /* (byte & mask) | exponent */

#define EACH_ROW(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define DOT(acc, v, s) \
    ((v16f)_mm512_dpbf16_ps((__m512)(acc), (__m512bh)(v), (__m512bh)_mm512_set1_epi32((int32_t)(s))))

/* As multiply in matmul.h, the same sums in the same order. Three rows share a pointer, and the compiler is kept from
 * having twelve: there are not so many registers for addresses. With UNPACKS, the panel is left in `unpacked` as matmul.h
 * wants it, for further tiles. */
static inline __attribute__((always_inline)) void multiply_panel(const int ROWS, const int UNPACKS,
                                                                 const compact_panel *p, const uint32_t *rows,
                                                                 int64_t stride, float *sums, uint32_t *unpacked,
                                                                 coming following) {
#define DECLARE(r) v16f low##r = {0}, high##r = {0};
#define MULTIPLY(r)                                                                                \
    if (r < ROWS) {                                                                                \
        const uint32_t x = *(const uint32_t *)(from[r / 3] + (r % 3) * row_bytes + 4 * is_second); \
        low##r = DOT(low##r, low, x);                                                              \
        high##r = DOT(high##r, high, x);                                                           \
    }
#define STORE(r)                                       \
    if (r < ROWS) {                                    \
        *(v16f *)(sums + r * PANEL) = low##r;          \
        *(v16f *)(sums + r * PANEL + TILE) = high##r;  \
    }
    EACH_ROW(DECLARE)
    const __m512i exponents = _mm512_loadu_si512(p->exponents);
    const int64_t row_bytes = stride * 4;
    const char *from[4];
    for (int i = 0; i < 4; i++) from[i] = (const char *)rows + 3 * i * row_bytes;
    const uint8_t *at = p->groups;
    lookahead look = look_ahead(at, at + p->num_groups * GROUP_BYTES, following);
    for (int64_t group = 0; group < p->num_groups; group++, at += GROUP_BYTES, look.ahead += GROUP_BYTES) {
        const char *wanted = look.ahead < look.end ? look.ahead : look.ahead + look.jump;
        const __m512i codes = _mm512_loadu_si512(at);
        for (int line = 0; line < GROUP_BYTES; line += 64) __builtin_prefetch(wanted + line, 0, 2);
        {
            const __m512i low = UNPACK(0), high = UNPACK(1);
            const int is_second = 0;
            EACH_ROW(MULTIPLY)
            if (UNPACKS) {
                _mm512_store_si512(unpacked, low);
                _mm512_store_si512(unpacked + TILE, high);
            }
        }
        const __m512i low = UNPACK(2), high = UNPACK(3);
        const int is_second = 1;
        EACH_ROW(MULTIPLY)
        if (UNPACKS) {
            _mm512_store_si512(unpacked + 2 * TILE, low);
            _mm512_store_si512(unpacked + 3 * TILE, high);
            unpacked += 4 * TILE;
        }
        for (int i = 0; i < 4; i++) from[i] += 8;
        __asm__("" : "+r"(from[0]), "+r"(from[1]), "+r"(from[2]), "+r"(from[3]));
    }
    EACH_ROW(STORE)
#undef DECLARE
#undef MULTIPLY
#undef STORE
}

/* sums[row][32] of `count` rows from `first` on, for one panel without its strays; the panel as matmul.h wants it in
 * `unpacked`, unless that is null. */
static void multiply_compact_avx512(const product *p, const compact_panel *weights, int64_t first, int count,
                                    float *sums, uint32_t *unpacked, coming next) {
    const uint32_t *rows = (const uint32_t *)p->input + first * p->stride;
#define CASE(n)                                                                       \
    case n:                                                                           \
        if (unpacked)                                                                 \
            multiply_panel(n, 1, weights, rows, p->stride, sums, unpacked, next);     \
        else                                                                          \
            multiply_panel(n, 0, weights, rows, p->stride, sums, unpacked, next);     \
        break;
    switch (count) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
    }
#undef CASE
}
#undef DOT
#undef EACH_ROW
#undef UNPACK
#pragma GCC pop_options
#endif
#endif
