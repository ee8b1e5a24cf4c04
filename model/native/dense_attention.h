/* Causal attention of whole sequences and its gradient, for training on the CPU: one translation of this text per
 * instruction set and element type, with the macros of variants.h.
 *
 * A unit of work is a sequence and kv head. Its queries are taken in blocks of BLOCK rows (Dao et al. 2022, with the
 * keys of a block all at once): scores against the keys up to the diagonal, softmax, weighted values. The gradient makes
 * the scores again from the row sums' logarithms. All products are one routine, `multiply`, over operands whose
 * inner dimension is packed in 32-bit steps (PAIR elements). Whatever lies beyond a sequence's end is zero in the packed
 * operands. head_dim is a multiple of TILE.
 *
 * Results depend on neither the number of threads nor the other sequences of the batch.
 */

#define COLUMNS(r, X) X(r, 0) X(r, 1) X(r, 2) X(r, 3)
#define GRID(X) COLUMNS(0, X) COLUMNS(1, X) COLUMNS(2, X) COLUMNS(3, X)
#define DECLARE(r, c) v16f acc##r##c = {0};

/* out[ROWS][16 * VECTORS] (+)= a . b over `steps` steps; a's element of row r and step s is a[r * a_row + s * a_step]. */
static inline __attribute__((always_inline)) void NAME(multiply_tile)(const int ROWS, const int VECTORS, int64_t steps,
                                                                      const uint32_t *a, int64_t a_row, int64_t a_step,
                                                                      const uint32_t *b, int64_t b_step, float *out,
                                                                      int64_t out_row, const int add) {
    GRID(DECLARE)
    for (int64_t step = 0; step < steps; step++) {
#define LOAD(c)             \
    v16u b##c = {0};        \
    if (c < VECTORS) b##c = *(const v16u_u *)(b + step * b_step + c * TILE);
#define MULTIPLY(r, c) \
    if (r < ROWS && c < VECTORS) acc##r##c = DOT(acc##r##c, b##c, a[r * a_row + step * a_step]);
        LOAD(0) LOAD(1) LOAD(2) LOAD(3)
        GRID(MULTIPLY)
    }
#define STORE(r, c)                                                                    \
    if (r < ROWS && c < VECTORS) {                                                     \
        if (add) acc##r##c += *(const v16f_u *)(out + r * out_row + c * TILE);         \
        *(v16f_u *)(out + r * out_row + c * TILE) = acc##r##c;                         \
    }
    GRID(STORE)
#undef LOAD
#undef MULTIPLY
#undef STORE
}
#undef COLUMNS
#undef GRID
#undef DECLARE

static inline __attribute__((always_inline)) void NAME(multiply_columns)(const int VECTORS, int64_t rows, int64_t steps,
                                                                         const uint32_t *a, int64_t a_row,
                                                                         int64_t a_step, const uint32_t *b,
                                                                         int64_t b_step, float *out, int64_t out_row,
                                                                         const int add) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4)
        NAME(multiply_tile)(4, VECTORS, steps, a + r * a_row, a_row, a_step, b, b_step, out + r * out_row, out_row, add);
    for (; r < rows; r++)
        NAME(multiply_tile)(1, VECTORS, steps, a + r * a_row, a_row, a_step, b, b_step, out + r * out_row, out_row, add);
}

/* out[rows][columns] (+)= a . b; `columns` is a multiple of TILE. */
static inline __attribute__((always_inline)) void NAME(multiply)(int64_t rows, int64_t columns, int64_t steps,
                                                                 const uint32_t *a, int64_t a_row, int64_t a_step,
                                                                 const uint32_t *b, int64_t b_step, float *out,
                                                                 int64_t out_row, const int add) {
    int64_t c = 0;
    for (; c + 4 * TILE <= columns; c += 4 * TILE)
        NAME(multiply_columns)(4, rows, steps, a, a_row, a_step, b + c, b_step, out + c, out_row, add);
    for (; c < columns; c += TILE)
        NAME(multiply_columns)(1, rows, steps, a, a_row, a_step, b + c, b_step, out + c, out_row, add);
}

/* packed[d / PAIR][padded] = the 32-bit steps of rows [count][d], transposed. */
static void NAME(pack_columns)(const ELEMENT *rows, int64_t stride, int64_t count, int64_t padded, int64_t d,
                               uint32_t *packed) {
    for (int64_t token = 0; token < padded; token += TILE)
        for (int64_t step = 0; step < d / PAIR; step++)
            for (int64_t lane = 0; lane < TILE; lane++) {
                uint32_t value = 0;
                if (token + lane < count) memcpy(&value, rows + (token + lane) * stride + step * PAIR, 4);
                packed[step * padded + token + lane] = value;
            }
}

/* packed[padded / PAIR][d]: elements of PAIR neighbouring rows side by side; rows beyond `count` are zero. */
static void NAME(pack_rows)(const ELEMENT *rows, int64_t stride, int64_t count, int64_t padded, int64_t d,
                            uint32_t *packed) {
    for (int64_t row = 0; row < padded; row += PAIR, packed += d) {
        const ELEMENT *first = rows + row * stride, *second = first + stride;
        for (int64_t i = 0; i < d; i += TILE) {
            v16u step = {0};
            if (row < count) step = WIDEN(first + i);
            if (PAIR == 2 && row + 1 < count) step |= WIDEN(second + i) << 16;
            *(v16u_u *)(packed + i) = step;
        }
    }
}

static void NAME(narrow_rows)(const float *values, int64_t values_row, int64_t rows, int64_t d, ELEMENT *out,
                              int64_t out_row) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < d; i += TILE) NARROW(out + r * out_row + i, *(const v16f_u *)(values + r * values_row + i));
}

/* All ones where row `row` of the block looks at the keys key … key + 15. */
static inline __attribute__((always_inline)) v16i NAME(visible)(const dense_step *p, int64_t query, int64_t key) {
    const v16i lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const v16i position = lane + (int32_t)key;
    v16i seen = position <= (int32_t)query;
    if (p->window > 0) seen &= position > (int32_t)(query - p->window);
    return seen;
}

/* The block's scores, unscaled: s->scores[row][key - low]. */
static inline __attribute__((always_inline)) void NAME(block_scores)(const dense_step *p, const dense_scratch *s,
                                                                     const block *b) {
    NAME(multiply)(b->rows, b->keys, p->head_dim / PAIR, (const uint32_t *)b->query, p->query_stride / PAIR, 1,
                   s->key_columns + b->low, s->padded, s->scores, s->padded, 0);
}

/* Output rows of the block and the logarithms of their softmax sums. */
static void NAME(attend_block)(const dense_step *p, const dense_scratch *s, const block *b) {
    const int64_t d = p->head_dim, pitch = s->padded;
    NAME(block_scores)(p, s, b);
    ELEMENT *weights = s->weights;
    float inverse[BLOCK];
    for (int64_t r = 0; r < b->rows; r++) {
        float *row = s->scores + r * pitch;
        const int64_t query = b->first + r;
        v16f high = (v16f){0} - INFINITY;
        for (int64_t i = 0; i < b->keys; i += TILE) {
            v16f score = *(v16f_u *)(row + i) * p->scale;
            if (b->low + i + TILE > query || p->window > 0)
                score = select16(NAME(visible)(p, query, b->low + i), score, (v16f){0} - INFINITY);
            *(v16f_u *)(row + i) = score;
            high = max16(high, score);
        }
        const float top = reduce_max16(high);
        const uint32_t key = p->drop_below ? row_key(p, b->head_row + r) : 0;
        v16f sum = {0};
        for (int64_t i = 0; i < b->keys; i += TILE) {
            v16f e = exp16(*(v16f_u *)(row + i) - top);
            sum += e;
            if (p->drop_below) e = select16(kept16(key, (uint32_t)(b->low + i), p->drop_below), e, (v16f){0});
            NARROW(weights + r * pitch + i, e);
        }
        const float total = reduce_sum16(sum);
        inverse[r] = p->keep_scale / total;
        p->log_sums[b->head_row + r] = top + logf(total);
    }
    NAME(multiply)(b->rows, d, b->keys / PAIR, (const uint32_t *)weights, pitch / PAIR, 1,
                   s->value_rows + b->low / PAIR * d, d, s->rows, d, 0);
    for (int64_t r = 0; r < b->rows; r++)
        for (int64_t i = 0; i < d; i += TILE)
            NARROW((ELEMENT *)b->output + r * p->output_stride + i, *(v16f_u *)(s->rows + r * d + i) * inverse[r]);
}

static inline __attribute__((always_inline)) float NAME(dot_rows)(const ELEMENT *a, const ELEMENT *b, int64_t d) {
    v16f sum = {0};
    for (int64_t i = 0; i < d; i += TILE) sum += (v16f)TO_FLOAT(a + i) * (v16f)TO_FLOAT(b + i);
    return reduce_sum16(sum);
}

/* The block's part of all three gradients. With P the weights, m the dropout's factors and g the output's gradient:
 * dV += (P m)^T g, dS = P (m (g V^T) - rowsum(g o)) scale, dQ = dS K, dK += dS^T Q. */
static void NAME(attend_block_backward)(const dense_step *p, const dense_scratch *s, const block *b) {
    const int64_t d = p->head_dim, pitch = s->padded;
    ELEMENT *weights = s->weights, *slopes = s->slopes;
    NAME(block_scores)(p, s, b);
    NAME(multiply)(b->rows, b->keys, d / PAIR, (const uint32_t *)b->output_grad, p->output_stride / PAIR, 1,
                   s->value_columns + b->low, pitch, s->weight_grads, pitch, 0);
    for (int64_t r = 0; r < b->rows; r++) {
        const int64_t query = b->first + r;
        const float log_sum = p->log_sums[b->head_row + r];
        const float mean = NAME(dot_rows)((const ELEMENT *)b->output_grad + r * p->output_stride,
                                          (const ELEMENT *)b->output + r * p->output_stride, d);
        const uint32_t key = p->drop_below ? row_key(p, b->head_row + r) : 0;
        for (int64_t i = 0; i < b->keys; i += TILE) {
            v16f score = *(v16f_u *)(s->scores + r * pitch + i) * p->scale - log_sum;
            /* Above zero only by rounding; exp16 takes no positive values. */
            v16f weight = exp16(select16(score < 0.0f, score, (v16f){0}));
            if (b->low + i + TILE > query || p->window > 0)
                weight = select16(NAME(visible)(p, query, b->low + i), weight, (v16f){0});
            v16f grad = *(v16f_u *)(s->weight_grads + r * pitch + i), dropped = weight;
            if (p->drop_below) {
                const v16i kept = kept16(key, (uint32_t)(b->low + i), p->drop_below);
                grad = select16(kept, grad * p->keep_scale, (v16f){0});
                dropped = select16(kept, weight * p->keep_scale, (v16f){0});
            }
            NARROW(weights + r * pitch + i, dropped);
            NARROW(slopes + r * pitch + i, weight * (grad - mean) * p->scale);
        }
    }
    NAME(multiply)(b->rows, d, b->keys / PAIR, (const uint32_t *)slopes, pitch / PAIR, 1,
                   s->key_rows + b->low / PAIR * d, d, s->rows, d, 0);
    NAME(narrow_rows)(s->rows, d, b->rows, d, b->query_grad, p->query_grad_stride);

    const int64_t steps = (b->rows + PAIR - 1) / PAIR;
    NAME(pack_rows)(slopes, pitch, b->rows, steps * PAIR, b->keys, s->pairs);
    NAME(pack_rows)(b->query, p->query_stride, b->rows, steps * PAIR, d, s->block_rows);
    NAME(multiply)(b->keys, d, steps, s->pairs, 1, b->keys, s->block_rows, d, s->key_grads + b->low * d, d, 1);
    NAME(pack_rows)(weights, pitch, b->rows, steps * PAIR, b->keys, s->pairs);
    NAME(pack_rows)(b->output_grad, p->output_stride, b->rows, steps * PAIR, d, s->block_rows);
    NAME(multiply)(b->keys, d, steps, s->pairs, 1, b->keys, s->block_rows, d, s->value_grads + b->low * d, d, 1);
}

/* One sequence and kv head, forwards or, where `query_grad` is given, backwards. */
static void NAME(attend_sequence)(const dense_step *p, const dense_scratch *s, int64_t batch, int64_t kv_head) {
    const int64_t d = p->head_dim, group = p->num_heads / p->num_kv_heads, length = p->length;
    const ELEMENT *key = (const ELEMENT *)p->key + batch * length * p->key_stride + kv_head * d;
    const ELEMENT *value = (const ELEMENT *)p->value + batch * length * p->value_stride + kv_head * d;
    const int backward = p->query_grad != NULL;
    NAME(pack_columns)(key, p->key_stride, length, s->padded, d, s->key_columns);
    if (backward) {
        NAME(pack_columns)(value, p->value_stride, length, s->padded, d, s->value_columns);
        NAME(pack_rows)(key, p->key_stride, length, s->padded, d, s->key_rows);
        memset(s->key_grads, 0, sizeof(float) * s->padded * d);
        memset(s->value_grads, 0, sizeof(float) * s->padded * d);
    } else {
        NAME(pack_rows)(value, p->value_stride, length, s->padded, d, s->value_rows);
    }
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
        for (int64_t first = 0; first < length; first += BLOCK) {
            const int64_t token = batch * length + first, left = length - first;
            block b = {.first = first, .rows = left < BLOCK ? left : BLOCK};
            if (p->window > 0 && first + 1 > p->window) b.low = (first + 1 - p->window) / TILE * TILE;
            b.keys = (first + b.rows - b.low + TILE - 1) / TILE * TILE;
            b.head_row = (batch * p->num_heads + head) * length + first;
            b.query = (const ELEMENT *)p->query + token * p->query_stride + head * d;
            b.output = (ELEMENT *)p->output + token * p->output_stride + head * d;
            if (backward) {
                b.output_grad = (const ELEMENT *)p->output_grad + token * p->output_stride + head * d;
                b.query_grad = (ELEMENT *)p->query_grad + token * p->query_grad_stride + head * d;
                NAME(attend_block_backward)(p, s, &b);
            } else {
                NAME(attend_block)(p, s, &b);
            }
        }
    if (!backward) return;
    NAME(narrow_rows)(s->key_grads, d, length, d, (ELEMENT *)p->key_grad + batch * length * p->key_grad_stride + kv_head * d,
                      p->key_grad_stride);
    NAME(narrow_rows)(s->value_grads, d, length, d,
                      (ELEMENT *)p->value_grad + batch * length * p->value_grad_stride + kv_head * d,
                      p->value_grad_stride);
}
