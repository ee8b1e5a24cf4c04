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

/* Scores of ROWS query rows against TILES tiles: scores[row][tile * 16 + lane]. The pointers of the TILES tiles behind
 * them are read too, for prefetching: blocks lie anywhere in memory, where the hardware does not look ahead. They are
 * fetched into the second-level cache, which takes more misses at a time than the first. */
static inline __attribute__((always_inline)) void NAME(score_tiles)(const int ROWS, const int TILES,
                                                                    const char *const *tiles, const uint32_t *query,
                                                                    int64_t steps, float scale, float *scores,
                                                                    int64_t stride) {
    GRID(DECLARE)
    for (int64_t step = 0; step < steps; step++) {
#define LOAD(t)                                               \
    v16u keys##t = {0};                                       \
    if (t < TILES) {                                          \
        keys##t = *(const v16u *)(tiles[t] + step * 64);      \
        __builtin_prefetch(tiles[t + TILES] + step * 64, 0, 2); \
    }
#define MULTIPLY(r, t) \
    if (r < ROWS && t < TILES) acc##r##t = DOT(acc##r##t, keys##t, query[r * steps + step]);
        LOAD(0) LOAD(1) LOAD(2) LOAD(3)
        GRID(MULTIPLY)
    }
#define STORE(r, t) \
    if (r < ROWS && t < TILES) *(v16f_u *)(scores + r * stride + t * TILE) = acc##r##t * scale;
    GRID(STORE)
#undef LOAD
#undef MULTIPLY
#undef STORE
}

/* sums[row][16 * CHUNKS dims] = weights[row][token] * values, over `tokens` tokens of consecutive tiles. */
static inline __attribute__((always_inline)) void NAME(weigh_tiles)(const int ROWS, const int CHUNKS,
                                                                    const char *const *tiles, int64_t tokens,
                                                                    const uint32_t *weights, int64_t stride,
                                                                    int64_t padded_dim, float *sums) {
    const int64_t steps = TILE / PAIR;
    GRID(DECLARE)
    for (int64_t tile = 0; tile * TILE < tokens; tile++) {
        int64_t left = tokens - tile * TILE;
        int64_t here = left >= TILE ? steps : (left + PAIR - 1) / PAIR;
        const char *values = tiles[tile], *ahead = tiles[tile + 1];
        const uint32_t *w = weights + tile * steps;
        for (int64_t step = 0; step < here; step++) {
            /* The last pair may hold one token only; what lies in the other half was never written. */
            const int half = PAIR == 2 && step * PAIR + 1 >= left;
#define LOAD(c)                                                                     \
    v16u values##c = {0};                                                           \
    if (c < CHUNKS) {                                                               \
        values##c = *(const v16u *)(values + (step * padded_dim + c * TILE) * 4);   \
        if (half) values##c = LOWER_HALF(values##c);                                \
        __builtin_prefetch(ahead + (step * padded_dim + c * TILE) * 4, 0, 2);       \
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

/* ROWS query rows of one kv head, with key limits last[row] (exclusive) and first[row]: see attend_rows. */
static inline __attribute__((always_inline)) void NAME(attend_fixed)(const int ROWS, const attention_step *p,
                                                                     scratch *s, int64_t num_tiles, int64_t tokens,
                                                                     const int64_t *first, const int64_t *last) {
    const int64_t steps = (p->head_dim + PAIR - 1) / PAIR, padded = padded_dim(p->head_dim);
    const int64_t stride = num_tiles * TILE / PAIR, score_stride = num_tiles * TILE;
    const int GROUP = ROWS == 1 ? MAX_GROUP : 2;
    int64_t t = 0;
    for (; t + GROUP <= num_tiles; t += GROUP)
        NAME(score_tiles)(ROWS, GROUP, s->key_tiles + t, s->query, steps, p->scale, s->scores + t * TILE, score_stride);
    for (; t < num_tiles; t++)
        NAME(score_tiles)(ROWS, 1, s->key_tiles + t, s->query, steps, p->scale, s->scores + t * TILE, score_stride);

    float totals[ROWS];
    for (int r = 0; r < ROWS; r++) {
        float *row = s->scores + r * score_stride;
        for (int64_t i = 0; i < first[r]; i++) row[i] = -INFINITY;
        for (int64_t i = last[r]; i < score_stride; i++) row[i] = -INFINITY;
        v16f high = *(v16f_u *)row;
        for (int64_t i = TILE; i < score_stride; i += TILE) high = max16(high, *(v16f_u *)(row + i));
        const float top = reduce_max16(high);
        v16f sum = {0};
        ELEMENT *w = (ELEMENT *)s->weights + r * score_stride;
        for (int64_t i = 0; i < score_stride; i += TILE) {
            v16f e = exp16(*(v16f_u *)(row + i) - top);
            sum += e;
            NARROW(w + i, e);
        }
        totals[r] = reduce_sum16(sum);
    }

    const char *const *value_tiles = s->value_tiles;
    const uint32_t *weights = (const uint32_t *)s->weights;
    float *sums = s->sums;
    for (int64_t dim = 0; dim < padded;) {
        const int chunks = dim + MAX_CHUNKS * TILE <= padded ? MAX_CHUNKS : 1;
        if (chunks == MAX_CHUNKS)
            NAME(weigh_tiles)(ROWS, MAX_CHUNKS, value_tiles, tokens, weights, stride, padded, sums + dim);
        else
            NAME(weigh_tiles)(ROWS, 1, value_tiles, tokens, weights, stride, padded, sums + dim);
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
