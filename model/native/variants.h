/* The text of the file KERNELS, once for each element type and instruction set, with these macros:
 *   NAME(x)           a suffix for every function: f32 or bf16, then base, avx2 or avx512
 *   ELEMENT           float, or uint16_t for bfloat16
 *   PAIR              elements in one 32-bit step: 1, or 2 for bfloat16
 *   DOT(acc, v, s)    acc + v * s per lane; v holds 16 lanes of 32 bits, s one 32-bit step of the other operand
 *   NARROW(dst, v)    store 16 floats as elements
 *   WIDEN(src)        16 elements as lanes of 32 bits
 *   TO_FLOAT(src)     16 elements as floats
 * "base" are portable vectors, for whatever the compiler's base instruction set is.
 */

#define ELEMENT float
#define PAIR 1
#define DOT dot_f32
#define NARROW NARROW_F32
#define WIDEN WIDEN_F32
#define TO_FLOAT TO_FLOAT_F32
#define NAME(x) x##_f32_base
#include KERNELS
#undef NAME
#ifdef HAVE_X86_VARIANTS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define NAME(x) x##_f32_avx2
#include KERNELS
#undef NAME
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define NAME(x) x##_f32_avx512
#include KERNELS
#undef NAME
#pragma GCC pop_options
#endif
#undef ELEMENT
#undef PAIR
#undef DOT
#undef NARROW
#undef WIDEN
#undef TO_FLOAT

#define ELEMENT uint16_t
#define PAIR 2
#define DOT dot_bf16
#define NARROW NARROW_BF16
#define WIDEN WIDEN_BF16
#define TO_FLOAT TO_FLOAT_BF16
#define NAME(x) x##_bf16_base
#include KERNELS
#undef NAME
#ifdef HAVE_X86_VARIANTS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define NAME(x) x##_bf16_avx2
#include KERNELS
#undef NAME
#pragma GCC pop_options
#undef DOT
#undef NARROW
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#define DOT(acc, v, s) \
    ((v16f)_mm512_dpbf16_ps((__m512)(acc), (__m512bh)(v), (__m512bh)_mm512_set1_epi32((int32_t)(s))))
#define NARROW(dst, v) _mm256_storeu_si256((__m256i *)(dst), (__m256i)_mm512_cvtneps_pbh((__m512)(v)))
#define NAME(x) x##_bf16_avx512
#include KERNELS
#undef NAME
#pragma GCC pop_options
#endif
#undef ELEMENT
#undef PAIR
#undef DOT
#undef NARROW
#undef WIDEN
#undef TO_FLOAT
#undef KERNELS
