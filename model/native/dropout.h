/* Dropout of up to one chunk of neighbouring elements, with the macros of variants.h. */

static void NAME(drop_chunk)(const void *input, void *output, int64_t count, uint32_t key, uint32_t drop_below,
                             float keep_scale) {
    const ELEMENT *in = input;
    ELEMENT *out = output;
    int64_t i = 0;
    for (; i + TILE <= count; i += TILE)
        NARROW(out + i, select16(kept16(key, (uint32_t)i, drop_below), TO_FLOAT(in + i) * keep_scale, (v16f){0}));
    if (i == count) return;
    ELEMENT rest[TILE] = {0};
    memcpy(rest, in + i, sizeof(ELEMENT) * (count - i));
    NARROW(rest, select16(kept16(key, (uint32_t)i, drop_below), TO_FLOAT(rest) * keep_scale, (v16f){0}));
    memcpy(out + i, rest, sizeof(ELEMENT) * (count - i));
}
