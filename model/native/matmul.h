/* Products of a few rows with packed weights, in float32 and bfloat16, with the macros of variants.h.
 *
 * Weights are packed in panels of 32 output features: [panel][steps][32 features][PAIR], a step being one 32-bit word
 * of every feature. A tile is MOST_ROWS rows by one panel; its accumulators stay in registers while one pass reads the
 * panel, and every sum is a chain along the steps, so that no bit of a row depends on which rows share its tile.
 */

#ifdef __AVX512F__
#define MOST_ROWS 12 /* 24 accumulators of 32 registers */
#else
#define MOST_ROWS 2
#endif

#define EACH_ROW(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)

static inline __attribute__((always_inline)) void NAME(multiply)(const int ROWS, const uint32_t *weights,
                                                                 const uint32_t *rows, int64_t stride, int64_t steps,
                                                                 float *sums, coming next) {
#define DECLARE(r) v16f low##r = {0}, high##r = {0};
    EACH_ROW(DECLARE)
    lookahead look = look_ahead(weights, weights + steps * PANEL, next);
    for (int64_t step = 0; step < steps; step++, weights += PANEL, look.ahead += 128) {
        const v16u low = *(const v16u *)weights, high = *(const v16u *)(weights + TILE);
        const char *wanted = look.ahead < look.end ? look.ahead : look.ahead + look.jump;
        __builtin_prefetch(wanted, 0, 2);
        __builtin_prefetch(wanted + 64, 0, 2);
#define MULTIPLY(r)                                    \
    if (r < ROWS) {                                    \
        const uint32_t x = rows[r * stride + step];    \
        low##r = DOT(low##r, low, x);                  \
        high##r = DOT(high##r, high, x);               \
    }
        EACH_ROW(MULTIPLY)
    }
#define STORE(r)                                       \
    if (r < ROWS) {                                    \
        *(v16f *)(sums + r * PANEL) = low##r;          \
        *(v16f *)(sums + r * PANEL + TILE) = high##r;  \
    }
    EACH_ROW(STORE)
#undef DECLARE
#undef MULTIPLY
#undef STORE
}

/* sums[row][32] of `count` rows from `first` on, for one panel. */
static void NAME(multiply_tile)(const product *p, int64_t panel, int64_t first, int count, float *sums,
                                coming next) {
    const uint32_t *weights = (const uint32_t *)p->matrix->weights + panel * p->matrix->steps * PANEL;
    const uint32_t *rows = (const uint32_t *)p->input + first * p->stride;
    const int64_t stride = p->stride, steps = p->matrix->steps;
#define CASE(n) case n: NAME(multiply)(n, weights, rows, stride, steps, sums, next); break;
    switch (count) {
        CASE(1)
        CASE(2)
#if MOST_ROWS > 2
        CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
#undef CASE
}
#undef EACH_ROW
#undef MOST_ROWS
