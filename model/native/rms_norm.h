/* RMS norm of float32 rows, whose result is ELEMENT, with the macros of variants.h. */

/* y = x / rms(x) weight, and 1 / rms(x). */
static void NAME(norm)(const elementwise *p, int64_t row) {
    const int64_t n = p->columns;
    const float *x = (const float *)p->input + row * n, *weight = p->weight;
    v16f sum = {0};
    for (int64_t i = 0; i < n; i += TILE) {
        const v16f v = *(const v16f_u *)(x + i);
        sum += v * v;
    }
    const float scale = 1.0f / sqrtf(reduce_sum16(sum) / n + p->eps);
    p->scales[row] = scale;
    for (int64_t i = 0; i < n; i += TILE)
        NARROW((ELEMENT *)p->output + row * n + i, *(const v16f_u *)(x + i) * scale * *(const v16f_u *)(weight + i));
}

/* dx = r (w dy) - x r^3 / n sum(w dy x), for the rows of one chunk, and the chunk's part of dw = sum of dy x r. */
static void NAME(norm_back)(const elementwise *p, int64_t chunk) {
    const int64_t n = p->columns, first = chunk * NORM_CHUNK, left = p->rows - first;
    float *weight_grad = p->weight_grads + chunk * n;
    for (int64_t i = 0; i < n; i += TILE) *(v16f_u *)(weight_grad + i) = (v16f){0};
    for (int64_t row = first; row < first + (left < NORM_CHUNK ? left : NORM_CHUNK); row++) {
        const float *x = (const float *)p->input + row * n, *weight = p->weight, scale = p->scales[row];
        const ELEMENT *grad = (const ELEMENT *)p->output_grad + row * n;
        v16f sum = {0};
        for (int64_t i = 0; i < n; i += TILE) {
            const v16f g = TO_FLOAT(grad + i), v = *(const v16f_u *)(x + i);
            sum += g * *(const v16f_u *)(weight + i) * v;
            *(v16f_u *)(weight_grad + i) += g * v * scale;
        }
        const float shared = reduce_sum16(sum) / n * scale * scale;
        for (int64_t i = 0; i < n; i += TILE) {
            const v16f g = TO_FLOAT(grad + i) * *(const v16f_u *)(weight + i);
            *(v16f_u *)((float *)p->output + row * n + i) = (g - *(const v16f_u *)(x + i) * shared) * scale;
        }
    }
}
