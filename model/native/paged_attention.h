/* Paged attention on the CPU, one translation of this text per instruction set and element type.
 *
 * The macros are those of variants.h; LOWER_HALF(v) is v with the second element of every pair cleared (bfloat16 only).
 *
 * The layout of a tile (16 tokens of one kv head), chosen so that every load is a full vector:
 *   keys    [ceil(d / PAIR)][16 tokens][PAIR]    a step along d for 16 tokens at once
 *   values  [16 / PAIR][padded d][PAIR]          a step along the tokens for 16 dimensions at once
 * A block of the cache is [kv heads][block_size / 16 tiles].
 *
 * Each output row is computed in an order that depends on nothing but its own context: scores are chains along d,
 * the softmax sum and the weighted values are chains along the tokens. Rows that share a tile, sequences that share
 * a step, chunks and threads therefore never change a bit of it. Masked tokens add an exact zero.
 */

static inline ELEMENT *NAME(key_tile)(const attention_step *p, int64_t seq, int64_t kv_head, int64_t tile) {
    const int64_t steps = (p->head_dim + PAIR - 1) / PAIR;
    return (ELEMENT *)p->key_cache + tile_index(p, seq, kv_head, tile) * steps * TILE * PAIR;
}

static inline ELEMENT *NAME(value_tile)(const attention_step *p, int64_t seq, int64_t kv_head, int64_t tile) {
    return (ELEMENT *)p->value_cache + tile_index(p, seq, kv_head, tile) * TILE * padded_dim(p->head_dim);
}

static inline void NAME(store_token)(ELEMENT *key_tile, ELEMENT *value_tile, const ELEMENT *key, const ELEMENT *value,
                                     int64_t offset, int64_t head_dim, int64_t padded_dim) {
    for (int64_t i = 0; i < head_dim; i++)
        key_tile[((i / PAIR) * TILE + offset) * PAIR + i % PAIR] = key[i];
    ELEMENT *row = value_tile + (offset / PAIR) * padded_dim * PAIR + offset % PAIR;
    for (int64_t i = 0; i < head_dim; i++) row[i * PAIR] = value[i];
}

/* Accumulators are sixteen names rather than an array: as an array the compiler keeps a copy of it in memory, and the
 * copy is written in every step. ROWS and the number of columns are constants, so unused names disappear. */
#define COLUMNS(r, X) X(r, 0) X(r, 1) X(r, 2) X(r, 3)
#define GRID(X) COLUMNS(0, X) COLUMNS(1, X) COLUMNS(2, X) COLUMNS(3, X)
#define DECLARE(r, c) v16f acc##r##c = {0};

/* Scores of ROWS query rows against each of TILES tiles, in columns: a column's queries lie `column_query` behind the
 * last column's, its scores `column_scores`. The tiles at tiles[ahead] and on are fetched meanwhile: blocks lie anywhere
 * in memory, where the hardware does not look ahead. They go into the second-level cache, which takes more misses at a
 * time than the first. */
static inline __attribute__((always_inline)) void NAME(score_tiles)(const int ROWS, const int TILES,
                                                                    const char *const *tiles, int64_t ahead,
                                                                    const uint32_t *query, int64_t column_query,
                                                                    int64_t steps, float scale, float *scores,
                                                                    int64_t stride, int64_t column_scores) {
    GRID(DECLARE)
    for (int64_t step = 0; step < steps; step++) {
#define LOAD(t)                                               \
    v16u keys##t = {0};                                       \
    if (t < TILES) {                                          \
        keys##t = *(const v16u *)(tiles[t] + step * 64);      \
        __builtin_prefetch(tiles[t + ahead] + step * 64, 0, 2); \
    }
#define MULTIPLY(r, t) \
    if (r < ROWS && t < TILES) acc##r##t = DOT(acc##r##t, keys##t, query[t * column_query + r * steps + step]);
        LOAD(0) LOAD(1) LOAD(2) LOAD(3)
        GRID(MULTIPLY)
    }
#define STORE(r, t) \
    if (r < ROWS && t < TILES) *(v16f_u *)(scores + t * column_scores + r * stride) = acc##r##t * scale;
    GRID(STORE)
#undef LOAD
#undef MULTIPLY
#undef STORE
}

/* sums[row][16 * CHUNKS dims] += weights[row][token] * values, over `tokens` tokens of consecutive tiles; from zero
 * unless they GO_ON. */
static inline __attribute__((always_inline)) void NAME(weigh_tiles)(const int ROWS, const int CHUNKS,
                                                                    const int GO_ON, const char *const *tiles,
                                                                    int64_t ahead, int64_t tokens,
                                                                    const uint32_t *weights, int64_t stride,
                                                                    int64_t padded_dim, float *sums) {
    const int64_t steps = TILE / PAIR;
    GRID(DECLARE)
#define RESUME(r, c) \
    if (GO_ON && r < ROWS && c < CHUNKS) acc##r##c = *(v16f *)(sums + r * padded_dim + c * TILE);
    GRID(RESUME)
#undef RESUME
    for (int64_t tile = 0; tile * TILE < tokens; tile++) {
        int64_t left = tokens - tile * TILE;
        int64_t here = left >= TILE ? steps : (left + PAIR - 1) / PAIR;
        const char *values = tiles[tile], *next = tiles[tile + ahead];
        const uint32_t *w = weights + tile * steps;
        for (int64_t step = 0; step < here; step++) {
            /* The last pair may hold one token only; what lies in the other half was never written. */
            const int half = PAIR == 2 && step * PAIR + 1 >= left;
#define LOAD(c)                                                                     \
    v16u values##c = {0};                                                           \
    if (c < CHUNKS) {                                                               \
        values##c = *(const v16u *)(values + (step * padded_dim + c * TILE) * 4);   \
        if (half) values##c = LOWER_HALF(values##c);                                \
        __builtin_prefetch(next + (step * padded_dim + c * TILE) * 4, 0, 2);       \
    }
#define MULTIPLY(r, c) \
    if (r < ROWS && c < CHUNKS) acc##r##c = DOT(acc##r##c, values##c, w[r * stride + step]);
            LOAD(0) LOAD(1) LOAD(2) LOAD(3)
            GRID(MULTIPLY)
        }
    }
#define STORE(r, c) \
    if (r < ROWS && c < CHUNKS) *(v16f *)(sums + r * padded_dim + c * TILE) = acc##r##c;
    GRID(STORE)
#undef LOAD
#undef MULTIPLY
#undef STORE
}
#undef COLUMNS
#undef GRID
#undef DECLARE

/* weights[i] = exp(row[i] - max) for the tokens [first, last), 0 for the others; returns their sum. */
static inline __attribute__((always_inline)) float NAME(exponentiate)(float *row, int64_t first, int64_t last,
                                                                      int64_t padded, ELEMENT *weights) {
    for (int64_t i = 0; i < first; i++) row[i] = -INFINITY;
    for (int64_t i = last; i < padded; i++) row[i] = -INFINITY;
    v16f high = *(v16f_u *)row;
    for (int64_t i = TILE; i < padded; i += TILE) high = max16(high, *(v16f_u *)(row + i));
    const float top = reduce_max16(high);
    v16f sum = {0};
    for (int64_t i = 0; i < padded; i += TILE) {
        v16f e = exp16(*(v16f_u *)(row + i) - top);
        sum += e;
        NARROW(weights + i, e);
    }
    return reduce_sum16(sum);
}

/* ROWS query rows of one kv head, with key limits last[row] (exclusive) and first[row]: see attend_rows. */
static inline __attribute__((always_inline)) void NAME(attend_fixed)(const int ROWS, const attention_step *p,
                                                                     scratch *s, int64_t num_tiles, int64_t tokens,
                                                                     const int64_t *first, const int64_t *last) {
    const int64_t steps = (p->head_dim + PAIR - 1) / PAIR, padded = padded_dim(p->head_dim);
    const int64_t stride = num_tiles * TILE / PAIR, score_stride = num_tiles * TILE;
    const int GROUP = ROWS == 1 ? MAX_GROUP : 2;
    int64_t t = 0;
    for (; t + GROUP <= num_tiles; t += GROUP)
        NAME(score_tiles)(ROWS, GROUP, s->key_tiles + t, GROUP, s->query, 0, steps, p->scale, s->scores + t * TILE,
                          score_stride, TILE);
    for (; t < num_tiles; t++)
        NAME(score_tiles)(ROWS, 1, s->key_tiles + t, 1, s->query, 0, steps, p->scale, s->scores + t * TILE,
                          score_stride, TILE);

    float totals[ROWS];
    for (int r = 0; r < ROWS; r++)
        totals[r] = NAME(exponentiate)(s->scores + r * score_stride, first[r], last[r], score_stride,
                                       (ELEMENT *)s->weights + r * score_stride);

    const char *const *value_tiles = s->value_tiles;
    const uint32_t *weights = (const uint32_t *)s->weights;
    float *sums = s->sums;
    for (int64_t dim = 0; dim < padded;) {
        const int chunks = dim + MAX_CHUNKS * TILE <= padded ? MAX_CHUNKS : 1;
        if (chunks == MAX_CHUNKS)
            NAME(weigh_tiles)(ROWS, MAX_CHUNKS, 0, value_tiles, 1, tokens, weights, stride, padded, sums + dim);
        else
            NAME(weigh_tiles)(ROWS, 1, 0, value_tiles, 1, tokens, weights, stride, padded, sums + dim);
        dim += chunks * TILE;
        for (int64_t i = 0; i < num_tiles; i++) s->value_tiles[i] += chunks * TILE * 4;
    }
    for (int r = 0; r < ROWS; r++)
        for (int64_t i = 0; i < padded; i += TILE) {
            v16f scaled = *(v16f *)(sums + r * padded + i) / totals[r];
            NARROW((ELEMENT *)s->output + r * padded + i, scaled);
        }
}

/* Attend `count` (at most MAX_ROWS) rows of one sequence and kv head; row i is query (row0 + i) / group, head
 * (row0 + i) % group of the kv head's group. */
static void NAME(attend_rows)(const attention_step *p, scratch *s, int64_t seq, int64_t kv_head, int64_t row0,
                              int64_t count) {
    const int64_t group = p->num_heads / p->num_kv_heads, d = p->head_dim, padded = padded_dim(d);
    const int64_t steps = (d + PAIR - 1) / PAIR;
    const int64_t query0 = p->cu_seqlens_q[seq], num_queries = p->cu_seqlens_q[seq + 1] - query0;
    const int64_t past = p->context_lens[seq] - num_queries;
    int64_t first[MAX_ROWS], last[MAX_ROWS];
    const int64_t low = past + row0 / group - p->window + 1;
    const int64_t tile0 = p->window > 0 && low > 0 ? low / TILE : 0;
    const int64_t tokens = past + (row0 + count - 1) / group + 1 - tile0 * TILE;
    const int64_t num_tiles = (tokens + TILE - 1) / TILE;
    memset(s->query, 0, sizeof(uint32_t) * steps * count);
    for (int64_t r = 0; r < count; r++) {
        const int64_t token = (row0 + r) / group, head = kv_head * group + (row0 + r) % group;
        const ELEMENT *q = (const ELEMENT *)p->query + (query0 + token) * p->query_stride + head * d;
        memcpy(s->query + r * steps, q, sizeof(ELEMENT) * d);
        const int64_t from = past + token + 1 - p->window - tile0 * TILE;
        first[r] = p->window > 0 && from > 0 ? from : 0;
        last[r] = past + token + 1 - tile0 * TILE;
    }
    for (int64_t t = 0; t < num_tiles; t++) {
        s->key_tiles[t] = (const char *)NAME(key_tile)(p, seq, kv_head, tile0 + t);
        s->value_tiles[t] = (const char *)NAME(value_tile)(p, seq, kv_head, tile0 + t);
    }
    for (int64_t t = num_tiles; t < num_tiles + MAX_GROUP; t++) {
        s->key_tiles[t] = s->value_tiles[0];
        s->value_tiles[t] = s->value_tiles[num_tiles - 1];
    }
    switch (count) {
        case 1: NAME(attend_fixed)(1, p, s, num_tiles, tokens, first, last); break;
        case 2: NAME(attend_fixed)(2, p, s, num_tiles, tokens, first, last); break;
        case 3: NAME(attend_fixed)(3, p, s, num_tiles, tokens, first, last); break;
        default: NAME(attend_fixed)(4, p, s, num_tiles, tokens, first, last); break;
    }
    for (int64_t r = 0; r < count; r++) {
        const int64_t token = (row0 + r) / group, head = kv_head * group + (row0 + r) % group;
        ELEMENT *out = (ELEMENT *)p->output + ((query0 + token) * p->num_heads + head) * d;
        memcpy(out, (ELEMENT *)s->output + r * padded, sizeof(ELEMENT) * d);
    }
}

/* The next token of a sequence, whose query heads are ROWS for each of its kv heads first_head … first_head + heads - 1.
 * Keys, then values are read tile by tile for all these heads, in the order in which they lie in a block. */
static inline __attribute__((always_inline)) void NAME(decode_fixed)(const int ROWS, const attention_step *p,
                                                                     scratch *s, int64_t seq, int64_t first_head,
                                                                     int64_t heads) {
    const int64_t d = p->head_dim, padded = padded_dim(d), steps = (d + PAIR - 1) / PAIR;
    const int64_t query0 = p->cu_seqlens_q[seq], end = p->context_lens[seq];
    const int64_t tile0 = p->window > 0 && end > p->window ? (end - p->window) / TILE : 0;
    const int64_t tokens = end - tile0 * TILE, num_tiles = (tokens + TILE - 1) / TILE;
    const int64_t first = p->window > 0 && tokens > p->window ? tokens - p->window : 0;
    const int64_t stride = num_tiles * TILE / PAIR, score_stride = num_tiles * TILE;
    memset(s->query, 0, sizeof(uint32_t) * (size_t)(steps * ROWS * heads));
    for (int64_t row = 0; row < ROWS * heads; row++)
        memcpy(s->query + row * steps,
               (const ELEMENT *)p->query + query0 * p->query_stride + (first_head * ROWS + row) * d,
               sizeof(ELEMENT) * (size_t)d);
    const int64_t key_stride = p->block_size * steps * 4, value_stride = p->block_size * padded * (int64_t)sizeof(ELEMENT);
    for (int64_t t = 0; t < num_tiles; t++) {
        const char *key = (const char *)NAME(key_tile)(p, seq, first_head, tile0 + t);
        const char *value = (const char *)NAME(value_tile)(p, seq, first_head, tile0 + t);
        for (int64_t h = 0; h < heads; h++) {
            s->key_tiles[t * heads + h] = key + h * key_stride;
            s->value_tiles[t * heads + h] = value + h * value_stride;
        }
    }
    for (int64_t h = 0; h < heads; h++) {
        s->key_tiles[num_tiles * heads + h] = s->value_tiles[h];
        s->value_tiles[num_tiles * heads + h] = s->value_tiles[(num_tiles - 1) * heads + h];
    }
    for (int64_t t = 0; t < num_tiles; t++) {
        const char *const *tiles = s->key_tiles + t * heads;
        int64_t h = 0;
        for (; h + MAX_GROUP <= heads; h += MAX_GROUP)
            NAME(score_tiles)(ROWS, MAX_GROUP, tiles + h, heads, s->query + h * ROWS * steps, ROWS * steps, steps,
                              p->scale, s->scores + h * ROWS * score_stride + t * TILE, score_stride,
                              ROWS * score_stride);
        for (; h < heads; h++)
            NAME(score_tiles)(ROWS, 1, tiles + h, heads, s->query + h * ROWS * steps, 0, steps, p->scale,
                              s->scores + h * ROWS * score_stride + t * TILE, score_stride, 0);
    }
    ELEMENT *weights = (ELEMENT *)s->weights;
    for (int64_t row = 0; row < ROWS * heads; row++)
        s->totals[row] = NAME(exponentiate)(s->scores + row * score_stride, first, tokens, score_stride,
                                            weights + row * score_stride);
    memset(s->sums, 0, sizeof(float) * (size_t)(padded * ROWS * heads));
    for (int64_t t = 0; t < num_tiles; t++) {
        const int64_t left = tokens - t * TILE, here = left < TILE ? left : TILE;
        for (int64_t h = 0; h < heads; h++) {
            const uint32_t *w = (const uint32_t *)(weights + h * ROWS * score_stride) + t * (TILE / PAIR);
            float *sums = s->sums + h * ROWS * padded;
            int64_t dim = 0;
            for (; dim < padded; dim += (dim + MAX_CHUNKS * TILE <= padded ? MAX_CHUNKS : 1) * TILE) {
                const char *tiles[2] = {s->value_tiles[t * heads + h] + dim * 4,
                                        s->value_tiles[(t + 1) * heads + h] + dim * 4};
                if (dim + MAX_CHUNKS * TILE <= padded)
                    NAME(weigh_tiles)(ROWS, MAX_CHUNKS, 1, tiles, 1, here, w, stride, padded, sums + dim);
                else
                    NAME(weigh_tiles)(ROWS, 1, 1, tiles, 1, here, w, stride, padded, sums + dim);
            }
        }
    }
    for (int64_t row = 0; row < ROWS * heads; row++) {
        ELEMENT *narrow = (ELEMENT *)s->output;
        for (int64_t i = 0; i < padded; i += TILE)
            NARROW(narrow + i, *(v16f *)(s->sums + row * padded + i) / s->totals[row]);
        memcpy((ELEMENT *)p->output + (query0 * p->num_heads + first_head * ROWS + row) * d, narrow,
               sizeof(ELEMENT) * (size_t)d);
    }
}

/* `rows`: the query heads of a kv head, at most MAX_ROWS. */
static void NAME(decode_heads)(const attention_step *p, scratch *s, int64_t seq, int64_t first_head, int64_t heads,
                               int64_t rows) {
    switch (rows) {
        case 1: NAME(decode_fixed)(1, p, s, seq, first_head, heads); break;
        case 2: NAME(decode_fixed)(2, p, s, seq, first_head, heads); break;
        case 3: NAME(decode_fixed)(3, p, s, seq, first_head, heads); break;
        default: NAME(decode_fixed)(4, p, s, seq, first_head, heads); break;
    }
}

/* Write the new keys and values of one sequence and kv head to their tiles. */
static void NAME(store_head)(const attention_step *p, int64_t seq, int64_t kv_head) {
    const int64_t query0 = p->cu_seqlens_q[seq], num_queries = p->cu_seqlens_q[seq + 1] - query0;
    const int64_t past = p->context_lens[seq] - num_queries, d = p->head_dim;
    for (int64_t i = 0; i < num_queries; i++) {
        const int64_t position = past + i;
        const ELEMENT *key = (const ELEMENT *)p->key + (query0 + i) * p->key_stride + kv_head * d;
        const ELEMENT *value = (const ELEMENT *)p->value + (query0 + i) * p->value_stride + kv_head * d;
        NAME(store_token)(NAME(key_tile)(p, seq, kv_head, position / TILE),
                          NAME(value_tile)(p, seq, kv_head, position / TILE), key, value, position % TILE, d,
                          padded_dim(d));
    }
}
