/* What the kernels share: vectors of 16 lanes, their helpers, and the thread pool. */

#ifndef QUILL_COMMON_H
#define QUILL_COMMON_H

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define HAVE_X86_VARIANTS 1
#endif

#pragma GCC diagnostic ignored "-Wpsabi"

#define TILE 16 /* lanes in a vector, and tokens in a tile */
#define SHARED __attribute__((visibility("hidden")))

typedef float v16f __attribute__((vector_size(64), may_alias));
typedef float v16f_u __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t v16u __attribute__((vector_size(64), may_alias));
typedef uint32_t v16u_u __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t v16i __attribute__((vector_size(64), may_alias));
typedef uint16_t v16h_u __attribute__((vector_size(32), aligned(2), may_alias));

enum { PORTABLE, AVX2, AVX512 };
enum { FLOAT32, BFLOAT16, INT8 };
enum { SILU, GELU_TANH, GELU, RELU, NO_ACTIVATION };

/* Runs a function on so many threads at once; null where there is no pool to take over. */
SHARED extern void (*quill_run_parallel)(void (*)(void *), void *, unsigned, unsigned);

/* How many threads the caller's parallel region has; null where there is no pool. */
SHARED extern int (*quill_team_size)(void);

/* The best instruction set of this machine for kernels on such elements, none above `most`. */
SHARED int quill_instruction_set(int element, int most);

/* The calling thread's working memory of at least `size` bytes on 64, kept between calls; null when memory ran out. */
SHARED void *quill_arena(size_t size);

/* Choose the instruction sets of the other files' kernels, none above `most`. */
SHARED void quill_choose_training(int most);
SHARED void quill_choose_elementwise(int most);
SHARED void quill_choose_decoder(int most);

static inline void *take(char **at, size_t size) {
    void *here = *at;
    *at += (size + 63) / 64 * 64;
    return here;
}

static inline __attribute__((always_inline)) v16f select16(v16i mask, v16f a, v16f b) {
    return (v16f)(((v16i)a & mask) | ((v16i)b & ~mask));
}

static inline __attribute__((always_inline)) v16f max16(v16f a, v16f b) { return select16(a > b, a, b); }

static inline __attribute__((always_inline)) float reduce_max16(v16f v) {
    float top = v[0];
    for (int i = 1; i < TILE; i++) top = v[i] > top ? v[i] : top;
    return top;
}

static inline __attribute__((always_inline)) float reduce_sum16(v16f v) {
    float sum = 0;
    for (int i = 0; i < TILE; i++) sum += v[i];
    return sum;
}

/* exp(x) for x <= 0, exactly 0 below -87; relative error about 2e-7. x = n ln2 + r, |r| <= ln2 / 2, and a Taylor
 * polynomial of degree 6 in r (its remainder there is below 2e-7). */
static inline __attribute__((always_inline)) v16f exp16(v16f x) {
    const v16i alive = x > -87.0f;
    x = select16(alive, x, (v16f){0});
    const v16i n = __builtin_convertvector(x * 1.44269504f - 0.5f, v16i);
    const v16f whole = __builtin_convertvector(n, v16f);
    const v16f r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    v16f y = r * (1.0f / 720) + (1.0f / 120);
    y = y * r + (1.0f / 24);
    y = y * r + (1.0f / 6);
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    return select16(alive, y * (v16f)((n + 127) << 23), (v16f){0});
}

static inline __attribute__((always_inline)) v16u round_bf16(v16f v) {
    const v16u bits = (v16u)v;
    const v16u rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (v16u)select16(v != v, (v16f)((bits >> 16) | 0x40), (v16f)rounded);
}

static inline __attribute__((always_inline)) v16f dot_bf16(v16f acc, v16u pairs, uint32_t scalar) {
    const union { uint32_t u; float f; } low = {scalar << 16}, high = {scalar & 0xffff0000u};
    acc += (v16f)(pairs << 16) * low.f;
    return acc + (v16f)(pairs & 0xffff0000u) * high.f;
}

static inline __attribute__((always_inline)) v16f dot_f32(v16f acc, v16u values, uint32_t scalar) {
    const union { uint32_t u; float f; } s = {scalar};
    return acc + (v16f)values * s.f;
}

#define LOWER_HALF(v) ((v) & 0x0000ffffu)
#define NARROW_F32(dst, v) (*(v16f_u *)(dst) = (v))
#define NARROW_BF16(dst, v) (*(v16h_u *)(dst) = __builtin_convertvector(round_bf16(v), v16h_u))

#define WIDEN_F32(src) (*(const v16u_u *)(src))
#define WIDEN_BF16(src) __builtin_convertvector(*(const v16h_u *)(src), v16u)
#define TO_FLOAT_F32(src) (*(const v16f_u *)(src))
#define TO_FLOAT_BF16(src) ((v16f)(WIDEN_BF16(src) << 16))

#endif
