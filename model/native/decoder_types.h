/* A decoder's weights, its memory and one of its steps, and the kernels that run it. */

#ifndef QUILL_DECODER_TYPES_H
#define QUILL_DECODER_TYPES_H

#include "common.h"

#define PANEL 32         /* output features that are computed together */
#define GROUP 128        /* inputs that share a scale in eight bits */
#define MAX_TILE_ROWS 12 /* rows that are computed together, at most */
#define MAX_HEAD_DIM 512

typedef int8_t v16b_u __attribute__((vector_size(16), aligned(1), may_alias));

enum { ELEMENTS, ADDED, FLOATS };

/* Packed weights of one product; see matmul.h and matmul_int8.h. `bias` is [panels * 32] or null. With `starts`
 * [panels], the bytes at which the panels begin, they are as compact.h has them. */
typedef struct {
    const void *weights;
    const int64_t *starts;
    const float *scales, *bias;
    int64_t panels, steps, groups;
} matrix;

typedef struct {
    const float *scale, *bias; /* [hidden_stride]; bias may be null */
} norm;

typedef struct {
    matrix qkv, o, up, down;
    norm attn_norm, mlp_norm;
    const float *q_norm, *k_norm; /* [head_dim] or null */
    void *key_cache, *value_cache;
} layer;

/* A model and the memory of its steps. Mirrored by `_Decoder` in model/cpu_decoder.py. Strides are in elements.
 * `embedding` [vocabulary][hidden_stride] is null when the packed head serves as one. `cosine` and `sine` are
 * [max_seq_len][angle_stride] or null, `position_table` is [max_seq_len][hidden_stride] or null. */
typedef struct {
    const layer *layers;
    matrix head;
    norm final_norm; /* scale is null without one */
    const void *embedding, *position_table;
    const float *cosine, *sine;
    float *x;                       /* [rows][hidden_stride] */
    void *input, *qkv, *attended, *inner; /* [rows][their strides] */
    void *bytes;                    /* int8: [rows][bytes_stride] */
    float *row_scales;              /* int8: [rows][most groups] */
    int32_t *row_starts;
    int64_t num_layers, hidden_size, hidden_stride, qkv_stride, q_size, inner_stride, bytes_stride, angle_stride;
    int64_t vocab_size, max_seq_len, num_heads, num_kv_heads, head_dim, block_size, window, max_rows;
    float norm_eps;
    int32_t weights, is_rms_norm, is_norm_first, is_gated, activation;
} decoder;

/* One step, mirrored by `_DecoderStep`. `rows` lists, in ascending order, whose hidden states are wanted; `output` is
 * [num_rows][hidden_stride] elements. */
typedef struct {
    const int64_t *input_ids, *positions, *rows;
    const int32_t *cu_seqlens_q, *context_lens, *block_tables;
    void *output;
    int64_t num_tokens, num_rows, num_seqs, max_blocks;
    int32_t num_threads;
} decoder_step;

/* `next` is the matrix that is read after this one, or null. */
typedef struct {
    const matrix *matrix, *next;
    const void *input;
    int64_t stride; /* of the input, in 32-bit steps */
    const float *row_scales;
    const int32_t *row_starts;
    void *output;
    int64_t output_stride, rows;
    int result, activation, is_gated;
} product;

/* Where a panel begins. */
static inline const char *panel_at(const matrix *m, int64_t panel) {
    return (const char *)m->weights + (m->starts ? m->starts[panel] : panel * m->steps * PANEL * 4);
}

/* How far ahead of the weights in use the next ones are asked for, in bytes. */
#define AHEAD 6144

/* What will be read after a panel, or null, and whether the panel itself is in the cache already: what follows is then
 * asked for from the start, and else towards the panel's end. */
typedef struct {
    const char *then;
    int is_resident;
} coming;

/* Where to look for weights, for those in use from `begin` to `end`: AHEAD of them, and with `jump` from `end` on. */
typedef struct {
    const char *ahead, *end;
    int64_t jump;
} lookahead;

static inline lookahead look_ahead(const void *begin, const void *end, coming next) {
    lookahead look = {(const char *)begin + AHEAD, (const char *)(next.is_resident ? begin : end), -AHEAD};
    if (next.then) look.jump = next.then - (next.is_resident ? look.ahead : look.end);
    return look;
}

static inline int64_t pair_of(int weights) { return weights == FLOAT32 ? 1 : weights == BFLOAT16 ? 2 : 4; }

typedef struct {
    void (*embed_row)(const decoder *, const decoder_step *, int64_t);
    void (*normalise)(const decoder *, const norm *, const float *, float *);
    void (*narrow_row)(const float *, void *, int64_t);
    void (*quantise_row)(const void *, int64_t, int8_t *, float *, int32_t *);
    void (*turn_row)(const decoder *, const layer *, const decoder_step *, int64_t);
    void (*finish_tile)(const product *, int64_t, int64_t, int, const float *);
} row_kernels;

/* A weight that compact weights leave out: column times PANEL plus its lane, and its value. */
typedef struct {
    int32_t place;
    float weight;
} stray;

/* A panel of compact weights; see compact.h. */
typedef struct {
    const uint16_t *exponents;
    const stray *strays;
    const uint8_t *groups; /* where `count` is negative, the panel as matmul.h has it */
    int64_t count, num_groups;
} compact_panel;

/* `multiply_compact` multiplies with compact weights as they are, and unpacks them by the way for further tiles; null where
 * no kernel reads them. */
typedef struct {
    int most_rows;
    void (*multiply_tile)(const product *, int64_t, int64_t, int, float *, coming);
    void (*multiply_compact)(const product *, const compact_panel *, int64_t, int, float *, uint32_t *, coming);
} tile_kernel;

/* See compact.c. */
SHARED int64_t quill_write_compact(const uint32_t *panel, int64_t steps, uint8_t *out);

/* The kernels in use, by the weights' type. */
SHARED extern row_kernels quill_row_kernels[3];
SHARED extern tile_kernel quill_tile_kernels[3];

#endif
