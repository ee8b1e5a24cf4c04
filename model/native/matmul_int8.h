/* Products of rows and weights in eight bits; DOT_INT8, ROWS_INT8 and NAME are given by decoder.c.
 *
 * Both sides are scaled in groups of GROUP inputs: rows are signed, weights are offset by 128, and what the offset adds,
 * 128 times the sum of a row's group, is what the accumulator starts from. A group's sum is exact in 32 bits
 * (128 * 127 * 255 < 2^31); groups are added in float32, in order.
 * Weights are [panel][steps][32 features][4], scales [panel][groups][32].
 */

#define EACH_ROW(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)

static inline __attribute__((always_inline)) void NAME(multiply_group)(const int ROWS, const uint32_t *weights,
                                                                       const uint32_t *rows, int64_t stride,
                                                                       int64_t steps, const int32_t *starts,
                                                                       const float *row_scales, int64_t groups,
                                                                       const float *scales, float *sums,
                                                                       lookahead look) {
#define DECLARE(r) v16i low##r = {0}, high##r = {0};
    EACH_ROW(DECLARE)
#define START(r) if (r < ROWS) low##r = high##r = (v16i){0} + starts[r * groups];
    EACH_ROW(START)
    for (int64_t step = 0; step < steps; step++, weights += PANEL, look.ahead += 128) {
        const v16u low = *(const v16u *)weights, high = *(const v16u *)(weights + TILE);
        const char *wanted = look.ahead < look.end ? look.ahead : look.ahead + look.jump;
        __builtin_prefetch(wanted, 0, 2);
        __builtin_prefetch(wanted + 64, 0, 2);
#define MULTIPLY(r)                                    \
    if (r < ROWS) {                                    \
        const uint32_t x = rows[r * stride + step];    \
        low##r = DOT_INT8(low##r, low, x);             \
        high##r = DOT_INT8(high##r, high, x);          \
    }
        EACH_ROW(MULTIPLY)
    }
    const v16f low = *(const v16f *)scales, high = *(const v16f *)(scales + TILE);
#define ADD(r)                                                                                       \
    if (r < ROWS) {                                                                                  \
        v16f *sum = (v16f *)(sums + r * PANEL);                                                      \
        sum[0] += __builtin_convertvector(low##r, v16f) * (low * row_scales[r * groups]);            \
        sum[1] += __builtin_convertvector(high##r, v16f) * (high * row_scales[r * groups]);          \
    }
    EACH_ROW(ADD)
#undef DECLARE
#undef START
#undef MULTIPLY
#undef ADD
}

/* sums[row][32] of `count` rows from `first` on, for one panel. */
static void NAME(multiply_tile)(const product *p, int64_t panel, int64_t first, int count, float *sums,
                                coming next) {
    const matrix *m = p->matrix;
    const char *begin = panel_at(m, panel);
    lookahead look = look_ahead(begin, begin + m->steps * PANEL * 4, next);
    const int64_t groups = m->groups, stride = p->stride;
    memset(sums, 0, sizeof(float) * PANEL * count);
    for (int64_t group = 0; group < groups; group++) {
        const int64_t from = group * (GROUP / 4), left = m->steps - from;
        const int64_t steps = left < GROUP / 4 ? left : GROUP / 4;
        const uint32_t *weights = (const uint32_t *)begin + from * PANEL;
        look.ahead = (const char *)weights + AHEAD;
        const uint32_t *rows = (const uint32_t *)p->input + first * stride + from;
        const int32_t *starts = p->row_starts + first * groups + group;
        const float *row_scales = p->row_scales + first * groups + group;
        const float *scales = m->scales + (panel * groups + group) * PANEL;
#define CASE(n) case n: NAME(multiply_group)(n, weights, rows, stride, steps, starts, row_scales, groups, scales, sums, \
                                                look); break;
        switch (count) {
            CASE(1)
            CASE(2)
#if ROWS_INT8 > 2
            CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
        }
#undef CASE
    }
}
#undef EACH_ROW
