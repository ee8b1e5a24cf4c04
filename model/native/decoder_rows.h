/* What a decoder's step does to rows, beside products and attention, with the macros of variants.h. Residuals and all
 * arithmetic are float32; what goes into a product is rounded to ELEMENT. Widths are padded to whole panels with zeros.
 */

#include "activation.h"

/* x = the token's embedding, plus its position's where those are learned. */
static void NAME(embed_row)(const decoder *m, const decoder_step *p, int64_t row) {
    float *x = m->x + row * m->hidden_stride;
    const int64_t token = p->input_ids[row];
    if (m->embedding) {
        const ELEMENT *from = (const ELEMENT *)m->embedding + token * m->hidden_stride;
        for (int64_t i = 0; i < m->hidden_stride; i += TILE) *(v16f *)(x + i) = TO_FLOAT(from + i);
    } else {
        unpack_row(&m->head, m->weights, token, x, m->hidden_size);
    }
    if (m->position_table) {
        const ELEMENT *from = (const ELEMENT *)m->position_table + p->positions[row] * m->hidden_stride;
        for (int64_t i = 0; i < m->hidden_stride; i += TILE) *(v16f *)(x + i) += TO_FLOAT(from + i);
    }
}

/* Sum of f(x) over a row whose padding must not count, in one fixed order. */
#define ROW_SUM(total, value)                                            \
    {                                                                    \
        v16f sums = {0};                                                 \
        int64_t i = 0;                                                   \
        for (; i + TILE <= n; i += TILE) {                               \
            const v16f v = *(const v16f *)(x + i);                       \
            sums += (value);                                             \
        }                                                                \
        total = reduce_sum16(sums);                                      \
        for (; i < n; i++) {                                             \
            const v16f v = (v16f){0} + x[i];                             \
            const v16f here = (value);                                   \
            total += here[0];                                            \
        }                                                                \
    }

/* y = norm(x), both float32 of the padded width; y may be x. */
static void NAME(normalise)(const decoder *m, const norm *weights, const float *x, float *y) {
    const int64_t n = m->hidden_size;
    float mean = 0, squares;
    if (m->is_rms_norm) {
        ROW_SUM(squares, v * v)
    } else {
        ROW_SUM(mean, v)
        mean /= (float)n;
        ROW_SUM(squares, (v - mean) * (v - mean))
    }
    const float scale = 1.0f / sqrtf(squares / (float)n + m->norm_eps);
    for (int64_t i = 0; i < m->hidden_stride; i += TILE) {
        v16f v = (*(const v16f *)(x + i) - mean) * scale * *(const v16f *)(weights->scale + i);
        if (weights->bias) v += *(const v16f *)(weights->bias + i);
        *(v16f *)(y + i) = v;
    }
}
#undef ROW_SUM

static void NAME(narrow_row)(const float *x, void *out, int64_t n) {
    for (int64_t i = 0; i < n; i += TILE) NARROW((ELEMENT *)out + i, *(const v16f *)(x + i));
}

/* The first `count` of 16 elements, zeros behind them. */
static inline __attribute__((always_inline)) v16f NAME(load_part)(const ELEMENT *in, int64_t count) {
    ELEMENT part[TILE] = {0};
    if (count >= TILE) return TO_FLOAT(in);
    memcpy(part, in, sizeof(ELEMENT) * (size_t)count);
    return TO_FLOAT(part);
}

/* A row of elements to signed bytes in groups of GROUP: q = round(127 x / max|x|), with each group's scale and what its
 * products' accumulators start from. */
static void NAME(quantise_row)(const void *row, int64_t n, int8_t *out, float *scales, int32_t *starts) {
    for (int64_t group = 0; group * GROUP < n; group++) {
        const ELEMENT *in = (const ELEMENT *)row + group * GROUP;
        const int64_t left = n - group * GROUP, count = left < GROUP ? left : GROUP;
        v16f most = {0};
        for (int64_t i = 0; i < count; i += TILE) {
            const v16f v = NAME(load_part)(in + i, count - i);
            most = max16(most, max16(v, -v));
        }
        const float top = reduce_max16(most), inverse = top > 0 ? 127.0f / top : 0.0f;
        v16i sum = {0};
        for (int64_t i = 0; i < count; i += TILE) {
            const v16f v = NAME(load_part)(in + i, count - i) * inverse;
            const v16i q = __builtin_convertvector(v + select16(v < 0.0f, (v16f){0} - 0.5f, (v16f){0} + 0.5f), v16i);
            sum += q;
            *(v16b_u *)(out + group * GROUP + i) = __builtin_convertvector(q, v16b_u);
        }
        int32_t total = 0;
        for (int lane = 0; lane < TILE; lane++) total += sum[lane];
        scales[group] = top / 127.0f;
        starts[group] = -128 * total;
    }
}

/* One head's RMS norm and rotary position in place: (a, b) -> (a cos - b sin, b cos + a sin), where b lies half a head
 * behind a. Loads may reach past the head, stores may not. */
static void NAME(turn_head)(const decoder *m, ELEMENT *head, const float *weight, const float *cosine,
                            const float *sine) {
    const int64_t d = m->head_dim, half = d / 2;
    float in[MAX_HEAD_DIM + TILE], out[MAX_HEAD_DIM + 2 * TILE];
    ELEMENT narrow[MAX_HEAD_DIM + TILE];
    for (int64_t i = 0; i < d; i += TILE) *(v16f_u *)(in + i) = TO_FLOAT(head + i);
    if (weight) {
        float squares = 0;
        for (int64_t i = 0; i < d; i++) squares += in[i] * in[i];
        const float scale = 1.0f / sqrtf(squares / (float)d + m->norm_eps);
        for (int64_t i = 0; i < d; i++) in[i] = in[i] * scale * weight[i];
    }
    const float *result = in;
    if (cosine) {
        result = out;
        for (int64_t i = 0; i < half; i += TILE)
            *(v16f_u *)(out + i) = *(v16f_u *)(in + i) * *(const v16f_u *)(cosine + i) -
                                   *(v16f_u *)(in + half + i) * *(const v16f_u *)(sine + i);
        for (int64_t i = 0; i < half; i += TILE)
            *(v16f_u *)(out + half + i) = *(v16f_u *)(in + half + i) * *(const v16f_u *)(cosine + i) +
                                          *(v16f_u *)(in + i) * *(const v16f_u *)(sine + i);
    }
    for (int64_t i = 0; i < d; i += TILE) NARROW(narrow + i, *(const v16f_u *)(result + i));
    memcpy(head, narrow, sizeof(ELEMENT) * (size_t)d);
}

/* Queries and keys of one row, before they are stored and used. */
static void NAME(turn_row)(const decoder *m, const layer *l, const decoder_step *p, int64_t row) {
    ELEMENT *head = (ELEMENT *)m->qkv + row * m->qkv_stride;
    const int64_t angle = p->positions[row] * m->angle_stride;
    const float *cosine = m->cosine ? m->cosine + angle : 0, *sine = m->cosine ? m->sine + angle : 0;
    for (int64_t i = 0; i < m->num_heads + m->num_kv_heads; i++, head += m->head_dim)
        NAME(turn_head)(m, head, i < m->num_heads ? l->q_norm : l->k_norm, cosine, sine);
}

static inline __attribute__((always_inline)) void NAME(finish_kind)(const int kind, const product *p, int64_t panel,
                                                                    int64_t first, int count, const float *sums) {
    const float *bias = p->matrix->bias ? p->matrix->bias + panel * PANEL : 0;
    const v16f none = {0};
    const v16f bias_low = bias ? *(const v16f *)bias : none, bias_high = bias ? *(const v16f *)(bias + TILE) : none;
    for (int r = 0; r < count; r++, sums += PANEL) {
        v16f slope, low = *(const v16f *)sums + bias_low, high = *(const v16f *)(sums + TILE) + bias_high;
        if (p->is_gated) {
            ELEMENT *out = (ELEMENT *)p->output + (first + r) * p->output_stride + panel * TILE;
            NARROW(out, NAME(value)(kind, low, &slope) * high);
            continue;
        }
        ELEMENT *out = (ELEMENT *)p->output + (first + r) * p->output_stride + panel * PANEL;
        if (kind != NO_ACTIVATION) {
            low = NAME(value)(kind, low, &slope);
            high = NAME(value)(kind, high, &slope);
        }
        NARROW(out, low);
        NARROW(out + TILE, high);
    }
}

/* What becomes of a tile's sums. */
static void NAME(finish_tile)(const product *p, int64_t panel, int64_t first, int count, const float *sums) {
    if (p->result != ELEMENTS) {
        const float *bias = p->matrix->bias ? p->matrix->bias + panel * PANEL : 0;
        for (int r = 0; r < count; r++)
            for (int i = 0; i < PANEL; i += TILE) {
                float *out = (float *)p->output + (first + r) * p->output_stride + panel * PANEL + i;
                v16f v = *(const v16f *)(sums + r * PANEL + i);
                if (bias) v += *(const v16f *)(bias + i);
                if (p->result == ADDED) v += *(const v16f *)out;
                *(v16f *)out = v;
            }
        return;
    }
    switch (p->activation) {
        case SILU: NAME(finish_kind)(SILU, p, panel, first, count, sums); break;
        case GELU_TANH: NAME(finish_kind)(GELU_TANH, p, panel, first, count, sums); break;
        case GELU: NAME(finish_kind)(GELU, p, panel, first, count, sums); break;
        case RELU: NAME(finish_kind)(RELU, p, panel, first, count, sums); break;
        default: NAME(finish_kind)(NO_ACTIVATION, p, panel, first, count, sums); break;
    }
}
