/* Laying bfloat16 weights out in 12 bits; see compact.h. */

#include "compact.h"

/* Zero's exponent and the fifteen most frequent others of a panel; `codes` [256] gives each its place, and 255 to those
 * that have none. */
static void choose_exponents(const uint16_t *words, int64_t num_words, uint16_t *exponents, uint8_t *codes) {
    uint32_t counts[2][256] = {{0}};
    for (int64_t i = 0; i < num_words; i++) counts[i % 2][words[i] >> 7 & 0xff]++;
    memset(codes, 255, 256);
    for (int place = 0; place < EXPONENTS; place++) {
        int best = 0;
        for (int e = 1; place > 0 && e < 256; e++)
            if (codes[e] == 255 &&
                (codes[best] != 255 || counts[0][e] + counts[1][e] > counts[0][best] + counts[1][best]))
                best = e;
        codes[best] = (uint8_t)place;
        exponents[place] = exponents[place + EXPONENTS] = (uint16_t)(best << 7);
    }
}

/* The weights of other exponents: their number, or -1 for more than `most`. */
static int64_t find_strays(const uint16_t *words, int64_t steps, const uint8_t *codes, stray *strays, int64_t most) {
    int64_t count = 0;
    for (int64_t step = 0; step < steps; step++, words += 2 * PANEL) {
        uint8_t missing = 0;
        for (int i = 0; i < 2 * PANEL; i++) missing |= codes[words[i] >> 7 & 0xff];
        for (int i = 0; missing & 0x80 && i < 2 * PANEL; i++) {
            if (codes[words[i] >> 7 & 0xff] != 255) continue;
            if (count == most) return -1;
            const int32_t column = (int32_t)(2 * step + i % 2);
            strays[count++] = (stray){column * PANEL + i / 2, bf16_at(words[i], 0)};
        }
    }
    return count;
}

static void write_group(const uint16_t *words, const uint8_t *codes, uint8_t *out) {
    uint16_t *places = (uint16_t *)out;
    memset(places, 0, 2 * TILE * sizeof(uint16_t));
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < 2 * TILE; i++) {
            const uint16_t word = words[k * 2 * TILE + i];
            const uint8_t code = codes[word >> 7 & 0xff];
            places[i] |= (uint16_t)((code == 255 ? 0 : code) << 4 * k);
            out[64 + 32 * k + i] = code == 255 ? 0 : (uint8_t)((word >> 8 & 0x80) | (word & 0x7f));
        }
}

/* A panel as it is; returns its bytes. */
static int64_t write_plain(const uint32_t *panel, int64_t steps, uint8_t *out) {
    const int32_t count = -1;
    memset(out, 0, HEADER);
    memcpy(out + sizeof(uint16_t) * 2 * EXPONENTS, &count, sizeof(count));
    memcpy(out + HEADER, panel, sizeof(uint32_t) * (size_t)(steps * PANEL));
    return HEADER + (int64_t)sizeof(uint32_t) * steps * PANEL;
}

/* A panel of `steps` steps, in matmul.h's layout, as compact.h has it. Returns its bytes, a multiple of 64 and at most
 * HEADER more than it takes now. */
int64_t quill_write_compact(const uint32_t *panel, int64_t steps, uint8_t *out) {
    const uint16_t *words = (const uint16_t *)panel;
    const int64_t num_groups = steps / 2;
    uint8_t codes[256];
    uint16_t exponents[2 * EXPONENTS];
    int32_t *head = (int32_t *)(out + sizeof(exponents));
    choose_exponents(words, steps * 2 * PANEL, exponents, codes);
    /* A stray costs about as much as it takes to multiply with a step. */
    const int64_t count = steps % 2 ? -1 : find_strays(words, steps, codes, (stray *)(head + 1), steps / 8);
    if (count < 0) return write_plain(panel, steps, out);
    memcpy(out, exponents, sizeof(exponents));
    *head = (int32_t)count;
    uint8_t *groups = out + HEADER_BYTES(count);
    for (int64_t group = 0; group < num_groups; group++)
        write_group(words + group * 8 * TILE, codes, groups + group * GROUP_BYTES);
    return groups - out + num_groups * GROUP_BYTES;
}
