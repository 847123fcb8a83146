/* Rows of blocks, as GGUF files have them, decoded to float32. No Python in here.

   What `sense_v2.engram.reading.block_rows` says of each format, to the same bits: each product and each sum is rounded
   to float32, and none is fused (the file is compiled with -ffp-contract=off).

   Codes are spread to a byte each first, and the bytes made floats in a second loop: compilers make vectors of both,
   and none, or slow ones, of a loop that does all of it. (Compiled for AVX2 the same code was slower.) The machine is
   little-endian, as rows on disk are. */

#ifndef SENSE_BLOCKS_H
#define SENSE_BLOCKS_H

#include <stdint.h>
#include <string.h>

/* A float16 (little-endian) as float32. By additions: torch may have told the processor to flush subnormal numbers. */
static inline float half_at(const uint8_t *at) {
    const uint32_t bits = at[0] | (uint32_t)at[1] << 8, magnitude = bits & 0x7FFF;
    uint32_t as_float = (magnitude << 13) + (112u << 23);
    float value;
    if (magnitude >= 0x7C00) as_float = magnitude << 13 | 0x7F800000;
    if (magnitude < 0x400) as_float = 0x38800000 | magnitude << 13;  /* 2^-14 too much */
    memcpy(&value, &as_float, 4);
    if (magnitude < 0x400) value -= 6.103515625e-05f;
    return bits & 0x8000 ? -value : value;
}

#define INLINE static inline __attribute__((always_inline)) void

/* 16 bytes with two codes each, the lower halves first. */
INLINE halves(const uint8_t *b, uint8_t *codes) {
    for (int k = 0; k < 16; k++) codes[k] = b[k] & 15;
    for (int k = 0; k < 16; k++) codes[16 + k] = b[k] >> 4;
}

/* Ors the fifth bits of 32 codes to them. Eight bits become eight bytes: a multiplication puts all of them into each
   byte, of which one is kept, and moved to the bottom by a carry. */
INLINE fifth_bits(const uint8_t *b, uint8_t *codes) {
    for (int k = 0; k < 4; k++) {
        const uint64_t kept = b[k] * UINT64_C(0x0101010101010101) & UINT64_C(0x8040201008040201);
        uint64_t eight;
        memcpy(&eight, codes + 8 * k, 8);
        eight |= (kept + UINT64_C(0x7F7F7F7F7F7F7F7F)) >> 3 & UINT64_C(0x1010101010101010);
        memcpy(codes + 8 * k, &eight, 8);
    }
}

INLINE scaled(const uint8_t *codes, int count, int zero, float scale, float *v) {
    for (int k = 0; k < count; k++) v[k] = scale * (float)(codes[k] - zero);
}

INLINE scaled_plus(const uint8_t *codes, int count, float scale, float offset, float *v) {
    for (int k = 0; k < count; k++) v[k] = scale * (float)codes[k] + offset;
}

INLINE q4_0(const uint8_t *b, float *v) {
    uint8_t codes[32];
    halves(b + 2, codes);
    scaled(codes, 32, 8, half_at(b), v);
}

INLINE q4_1(const uint8_t *b, float *v) {
    uint8_t codes[32];
    halves(b + 4, codes);
    scaled_plus(codes, 32, half_at(b), half_at(b + 2), v);
}

INLINE q5_0(const uint8_t *b, float *v) {
    uint8_t codes[32];
    halves(b + 6, codes);
    fifth_bits(b + 2, codes);
    scaled(codes, 32, 16, half_at(b), v);
}

INLINE q5_1(const uint8_t *b, float *v) {
    uint8_t codes[32];
    halves(b + 8, codes);
    fifth_bits(b + 4, codes);
    scaled_plus(codes, 32, half_at(b), half_at(b + 2), v);
}

INLINE q8_0(const uint8_t *b, float *v) {
    const float scale = half_at(b);
    for (int k = 0; k < 32; k++) v[k] = scale * (float)(int8_t)b[2 + k];
}

INLINE iq4_nl(const uint8_t *b, float *v) {
    static const int8_t levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    const float scale = half_at(b);
    float values[16];
    for (int k = 0; k < 16; k++) values[k] = scale * (float)levels[k];
    for (int k = 0; k < 16; k++) v[k] = values[b[2 + k] & 15];
    for (int k = 0; k < 16; k++) v[16 + k] = values[b[2 + k] >> 4];
}

/* 256 values in groups of 16 or 32. Runs of bytes have the lowest bits of a group's codes, then those of the next. */

INLINE q2_k(const uint8_t *b, float *v) {
    const float scale = half_at(b + 80), least = half_at(b + 82);
    for (int group = 0; group < 16; group++) {
        const uint8_t *from = b + 16 + group / 8 * 32 + group % 2 * 16;
        const int shift = group % 8 / 2 * 2;
        uint8_t codes[16];
        for (int k = 0; k < 16; k++) codes[k] = from[k] >> shift & 3;
        scaled_plus(codes, 16, scale * (float)(b[group] & 15), -(least * (float)(b[group] >> 4)), v + 16 * group);
    }
}

INLINE q3_k(const uint8_t *b, float *v) {
    const float scale = half_at(b + 108);
    for (int group = 0; group < 16; group++) {
        const uint8_t *from = b + 32 + group / 8 * 32 + group % 2 * 16, *third = b + group % 2 * 16;
        const int low = b[96 + group % 8] >> (group / 8 * 4) & 15, high = b[104 + group % 4] >> (group / 4 * 2) & 3;
        const int shift = group % 8 / 2 * 2, bit = group / 2;
        uint8_t codes[16];
        for (int k = 0; k < 16; k++) codes[k] = (from[k] >> shift & 3) | (third[k] >> bit & 1) << 2;
        scaled(codes, 16, 4, scale * (float)((low | high << 4) - 32), v + 16 * group);
    }
}

/* Scale and minimum of a group of Q4_K and Q5_K, six bits each in twelve bytes. */
INLINE small_scales(const uint8_t *b, int group, int *scale, int *minimum) {
    const uint8_t *first = b + 4, *second = b + 8, *last = b + 12;
    if (group < 4) {
        *scale = first[group] & 63, *minimum = second[group] & 63;
    } else {
        *scale = (last[group - 4] & 15) | first[group - 4] >> 6 << 4;
        *minimum = last[group - 4] >> 4 | second[group - 4] >> 6 << 4;
    }
}

INLINE q4_k(const uint8_t *b, float *v) {
    const float scale = half_at(b), least = half_at(b + 2);
    for (int group = 0; group < 8; group++) {
        const uint8_t *from = b + 16 + group / 2 * 32;
        const int shift = group % 2 * 4;
        int small, minimum;
        small_scales(b, group, &small, &minimum);
        uint8_t codes[32];
        for (int k = 0; k < 32; k++) codes[k] = from[k] >> shift & 15;
        scaled_plus(codes, 32, scale * (float)small, -(least * (float)minimum), v + 32 * group);
    }
}

INLINE q5_k(const uint8_t *b, float *v) {
    const float scale = half_at(b), least = half_at(b + 2);
    for (int group = 0; group < 8; group++) {
        const uint8_t *from = b + 48 + group / 2 * 32, *fifth = b + 16;
        const int shift = group % 2 * 4;
        int small, minimum;
        small_scales(b, group, &small, &minimum);
        uint8_t codes[32];
        for (int k = 0; k < 32; k++) codes[k] = (from[k] >> shift & 15) | (fifth[k] >> group & 1) << 4;
        scaled_plus(codes, 32, scale * (float)small, -(least * (float)minimum), v + 32 * group);
    }
}

INLINE q6_k(const uint8_t *b, float *v) {
    const float scale = half_at(b + 208);
    for (int group = 0; group < 16; group++) {
        const int run = group / 2;  /* of 32 values */
        const uint8_t *from = b + run / 4 * 64 + run % 2 * 32 + group % 2 * 16;
        const uint8_t *upper = b + 128 + run / 4 * 32 + group % 2 * 16;
        const int shift = run % 4 / 2 * 4, upper_shift = run % 4 * 2;
        uint8_t codes[16];
        for (int k = 0; k < 16; k++) codes[k] = (from[k] >> shift & 15) | (upper[k] >> upper_shift & 3) << 4;
        scaled(codes, 16, 32, scale * (float)(int8_t)b[192 + group], v + 16 * group);
    }
}

/* `width` values of one row. A last block that isn't needed whole is decoded beside the row. */
#define FORMAT(name, block_values, block_bytes)                                                     \
    static void name##_row(const uint8_t *row, float *v, int64_t width) {                           \
        float rest[block_values];                                                                   \
        for (; width >= block_values; width -= block_values, row += block_bytes, v += block_values) \
            name(row, v);                                                                           \
        if (width) {                                                                                \
            name(row, rest);                                                                        \
            memcpy(v, rest, (size_t)width * sizeof *v);                                             \
        }                                                                                           \
    }

FORMAT(q4_0, 32, 18)
FORMAT(q4_1, 32, 20)
FORMAT(q5_0, 32, 22)
FORMAT(q5_1, 32, 24)
FORMAT(q8_0, 32, 34)
FORMAT(iq4_nl, 32, 18)
FORMAT(q2_k, 256, 84)
FORMAT(q3_k, 256, 110)
FORMAT(q4_k, 256, 144)
FORMAT(q5_k, 256, 176)
FORMAT(q6_k, 256, 210)

typedef void (*DecodeRow)(const uint8_t *row, float *values, int64_t width);

typedef struct {
    int block_values, block_bytes;
    DecodeRow decode;
} Blocks;

/* By the number of the type in a GGUF file. */
static const Blocks block_formats[] = {
    [2] = {32, 18, q4_0_row},    [3] = {32, 20, q4_1_row},    [6] = {32, 22, q5_0_row},    [7] = {32, 24, q5_1_row},
    [8] = {32, 34, q8_0_row},    [10] = {256, 84, q2_k_row},  [11] = {256, 110, q3_k_row}, [12] = {256, 144, q4_k_row},
    [13] = {256, 176, q5_k_row}, [14] = {256, 210, q6_k_row}, [20] = {32, 18, iq4_nl_row},
};

/* NULL for a number that isn't there. */
static const Blocks *blocks_of(long number) {
    const long count = sizeof block_formats / sizeof *block_formats;
    return number > 0 && number < count && block_formats[number].decode ? &block_formats[number] : NULL;
}

#endif
