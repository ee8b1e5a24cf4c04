/* Activations, RMS norm and rotary positions of training, forwards and backwards, with the macros of variants.h.
 * Rows are [columns]; columns are multiples of TILE. Arithmetic is in float32 whatever the elements are.
 */

#include "activation.h"

/* out = f(in) for rows of `columns`; gated: in is [2 columns], gate then up, and out = f(gate) up. */
static inline __attribute__((always_inline)) void NAME(activate_kind)(const int kind, const int gated,
                                                                      const elementwise *p, int64_t row) {
    const int64_t n = p->columns;
    const ELEMENT *in = (const ELEMENT *)p->input + row * (gated ? 2 * n : n);
    for (int64_t i = 0; i < n; i += TILE) {
        v16f slope, y = NAME(value)(kind, TO_FLOAT(in + i), &slope);
        if (gated) y = y * TO_FLOAT(in + n + i);
        NARROW((ELEMENT *)p->output + row * n + i, y);
    }
}

/* The input's gradient from the output's. */
static inline __attribute__((always_inline)) void NAME(activate_back_kind)(const int kind, const int gated,
                                                                           const elementwise *p, int64_t row) {
    const int64_t n = p->columns, width = gated ? 2 * n : n;
    const ELEMENT *in = (const ELEMENT *)p->input + row * width, *grad = (const ELEMENT *)p->output_grad + row * n;
    ELEMENT *out = (ELEMENT *)p->output + row * width;
    for (int64_t i = 0; i < n; i += TILE) {
        v16f slope, g = TO_FLOAT(grad + i);
        const v16f y = NAME(value)(kind, TO_FLOAT(in + i), &slope);
        if (gated) {
            NARROW(out + n + i, g * y);
            g = g * TO_FLOAT(in + n + i);
        }
        NARROW(out + i, g * slope);
    }
}

static void NAME(activate)(const elementwise *p, int64_t row) {
    switch (p->kind * 2 + p->gated) {
        case SILU * 2: NAME(activate_kind)(SILU, 0, p, row); break;
        case SILU * 2 + 1: NAME(activate_kind)(SILU, 1, p, row); break;
        case GELU_TANH * 2: NAME(activate_kind)(GELU_TANH, 0, p, row); break;
        case GELU_TANH * 2 + 1: NAME(activate_kind)(GELU_TANH, 1, p, row); break;
        case GELU * 2: NAME(activate_kind)(GELU, 0, p, row); break;
        default: NAME(activate_kind)(GELU, 1, p, row); break;
    }
}

static void NAME(activate_back)(const elementwise *p, int64_t row) {
    switch (p->kind * 2 + p->gated) {
        case SILU * 2: NAME(activate_back_kind)(SILU, 0, p, row); break;
        case SILU * 2 + 1: NAME(activate_back_kind)(SILU, 1, p, row); break;
        case GELU_TANH * 2: NAME(activate_back_kind)(GELU_TANH, 0, p, row); break;
        case GELU_TANH * 2 + 1: NAME(activate_back_kind)(GELU_TANH, 1, p, row); break;
        case GELU * 2: NAME(activate_back_kind)(GELU, 0, p, row); break;
        default: NAME(activate_back_kind)(GELU, 1, p, row); break;
    }
}

/* Rotary positions of one token's heads, head_dim = columns: (a, b) -> (a cos - b sin, b cos + a sin), where b lies
 * half a head behind a. `sign` -1 turns back, which is the gradient. The angles' row is the token's position. */
static void NAME(rotate)(const elementwise *p, int64_t row) {
    const int64_t half = p->columns / 2;
    const ELEMENT *in = (const ELEMENT *)p->input + row * p->input_stride;
    ELEMENT *out = (ELEMENT *)p->output + row * p->num_heads * p->columns;
    const int64_t angle = row % p->length * p->angle_stride;
    const float *cosine = p->cosine + angle, *sine = p->sine + angle;
    for (int64_t head = 0; head < p->num_heads; head++, in += p->columns, out += p->columns)
        for (int64_t i = 0; i < half; i += TILE) {
            const v16f a = TO_FLOAT(in + i), b = TO_FLOAT(in + half + i);
            const v16f c = *(const v16f_u *)(cosine + i), s = *(const v16f_u *)(sine + i) * p->sign;
            NARROW(out + i, a * c - b * s);
            NARROW(out + half + i, b * c + a * s);
        }
}
