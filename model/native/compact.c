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

/* One group, with zeros for weights of other exponents. Returns whether there are any. */
static int write_group(const uint16_t *words, const uint8_t *codes, uint8_t *out) {
    uint16_t *places = (uint16_t *)out;
    uint8_t missing = 0;
    memset(places, 0, 2 * TILE * sizeof(uint16_t));
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < 2 * TILE; i++) {
            const uint16_t word = words[k * 2 * TILE + i];
            const uint8_t code = codes[word >> 7 & 0xff];
            missing |= code;
            places[i] |= (uint16_t)((code & 15) << 4 * k);
            out[64 + 32 * k + i] = (uint8_t)((word >> 8 & 0x80) | (word & 0x7f));
        }
    return missing >= EXPONENTS;
}

/* Take the weights of other exponents out of a group that was written: their number, or -1 for more than `most`. */
static int64_t take_strays(const uint16_t *words, int64_t group, const uint8_t *codes, uint8_t *out, stray *strays,
                           int64_t most) {
    int64_t count = 0;
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < 2 * TILE; i++) {
            const uint16_t word = words[k * 2 * TILE + i];
            if (codes[word >> 7 & 0xff] < EXPONENTS) continue;
            if (count == most) return -1;
            const int32_t column = (int32_t)(4 * group + k / 2 * 2 + i % 2), lane = k % 2 * TILE + i / 2;
            strays[count++] = (stray){column * PANEL + lane, bf16_at(word, 0)};
            ((uint16_t *)out)[i] &= (uint16_t) ~(15 << 4 * k);
            out[64 + 32 * k + i] = 0;
        }
    return count;
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
    /* A stray costs about as much as it takes to multiply with a step. */
    const int64_t num_groups = steps / 2, most = steps / 8;
    uint8_t codes[256], *groups = out + HEADER_BYTES(most);
    int32_t *head = (int32_t *)(out + sizeof(uint16_t) * 2 * EXPONENTS), count = 0;
    stray *strays = (stray *)(head + 1);
    if (steps % 2) return write_plain(panel, steps, out);
    memset(out, 0, HEADER);
    choose_exponents(words, steps * 2 * PANEL, (uint16_t *)out, codes);
    for (int64_t group = 0; group < num_groups; group++, words += 8 * TILE) {
        uint8_t *at = groups + group * GROUP_BYTES;
        if (!write_group(words, codes, at)) continue;
        const int64_t found = take_strays(words, group, codes, at, strays + count, most - count);
        if (found < 0) return write_plain(panel, steps, out);
        count += (int32_t)found;
    }
    *head = count;
    memmove(out + HEADER_BYTES(count), groups, (size_t)(num_groups * GROUP_BYTES));
    return HEADER_BYTES(count) + num_groups * GROUP_BYTES;
}
