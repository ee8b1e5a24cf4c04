/* An activation of 16 values and its slope, with the macros of variants.h; `kind` is a constant of the caller. */

static inline __attribute__((always_inline)) v16f NAME(value)(const int kind, v16f x, v16f *slope) {
    const v16f zero = {0}, one = zero + 1.0f;
    const v16i negative = x < 0.0f;
    if (kind == RELU) {
        *slope = select16(x > 0.0f, one, zero);
        return select16(x > 0.0f, x, zero);
    }
    if (kind == SILU) {
        const v16f e = exp16(select16(negative, x, -x)), upper = 1.0f / (1.0f + e);
        const v16f s = select16(negative, e * upper, upper);
        *slope = s * (1.0f + x * (1.0f - s));
        return x * s;
    }
    v16f phi, density_x; /* the distribution function, and x times its derivative */
    if (kind == GELU_TANH) {
        const float c = 0.7978845608f; /* sqrt(2 / pi) */
        /* Beyond 10 the slope is 0 or 1 to the last bit, but the cube may overflow. */
        const v16f near = select16(x > 10.0f, zero + 10.0f, select16(x < -10.0f, zero - 10.0f, x));
        const v16f u = c * near * (1.0f + 0.044715f * near * near);
        const v16f e = exp16(-2.0f * select16(u < 0.0f, -u, u)), size = (1.0f - e) / (1.0f + e);
        const v16f t = select16(negative, -size, size);
        phi = 0.5f * (1.0f + t);
        density_x = 0.5f * near * (1.0f - t * t) * c * (1.0f + 3 * 0.044715f * near * near);
    } else {
        /* erf by Abramowitz and Stegun 7.1.26: absolute error below 1.5e-7 */
        const v16f z = select16(negative, -x, x) * 0.7071067812f, t = 1.0f / (1.0f + 0.3275911f * z);
        const v16f gauss = exp16(-z * z);
        v16f y = t * 1.061405429f - 1.453152027f;
        y = y * t + 1.421413741f;
        y = y * t - 0.284496736f;
        y = y * t + 0.254829592f;
        const v16f tail = 0.5f * y * t * gauss; /* the probability beyond |x| */
        phi = select16(negative, tail, one - tail);
        density_x = x * gauss * 0.3989422804f;
    }
    *slope = phi + density_x;
    return x * phi;
}
