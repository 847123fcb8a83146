/* Rows of a table, copied or decoded one after the other into a result. No Python in here.

   A random row is a miss of the cache and of the TLB, so what counts is how many lines are on their way at once. The
   ways to have many of them:

   one by one     memcpy, row after row: the processor fetches the lines of a long row by itself
   ahead          the same, the lines of rows to come asked for before
   2, 4 beside    so many rows side by side, a line of each in turn: the processor fetches along several rows at once

   Each by ordinary stores, or by stores past the cache, for a result that is too large for it. Which one is the fastest
   is the processor's: stores past the cache to four places a page apart take 3.6 times as long on one as on another.
   A batch that isn't large is copied the `default_way`; `_ways.h` finds the best for large ones. Rows of blocks
   (`_blocks.h`) are short, and decoded one by one, the next ones asked for ahead. */

#ifndef SENSE_COPY_H
#define SENSE_COPY_H

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "_blocks.h"

enum {
    LINE_BYTES = 64,
    AHEAD_BYTES = 2048, AHEAD_ROWS_MIN = 8, AHEAD_ROWS_MAX = 32,  /* of rows asked for before they are copied */
    LONG_ROW_BYTES = 1024, HEAD_LINES = 2,
    APART_BYTES = 2048,  /* rows that, stored past the cache, are copied two by two unless another way was found */
    FETCHED_LINES = 64,
};

enum { ONE_BY_ONE, AHEAD, BESIDE_2, BESIDE_4, PAST_CACHE, WAYS = 2 * PAST_CACHE };  /* a way, + PAST_CACHE */

typedef struct {
    const char *table, *ids;
    char *out;
    int64_t row_bytes, num_ids;
    int id_bytes;
    int64_t out_bytes;  /* of a row in the result */
    DecodeRow decode;   /* NULL for rows that are copied as they are */
} Copy;

static inline int64_t id_at(const Copy *copy, int64_t k) {
    return copy->id_bytes == 8 ? ((const int64_t *)copy->ids)[k] : ((const int32_t *)copy->ids)[k];
}

static inline const char *row_at(const Copy *copy, int64_t k) { return copy->table + id_at(copy, k) * copy->row_bytes; }

static inline void fetch(const char *row, int64_t num_bytes) {
    for (int64_t at = 0; at < num_bytes; at += LINE_BYTES) __builtin_prefetch(row + at);
}

static inline void copy_line(char *out, const char *row, int stream) {
#if defined(__x86_64__)
    if (stream) {
        const __m128i *from = (const __m128i *)row;
        __m128i *to = (__m128i *)out;
        __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
        __m128i c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
        _mm_stream_si128(to, a);
        _mm_stream_si128(to + 1, b);
        _mm_stream_si128(to + 2, c);
        _mm_stream_si128(to + 3, d);
        return;
    }
#endif
    (void)stream;
    memcpy(out, row, LINE_BYTES);
}

/* Line by line: of a memcpy whose length is known to be small, compilers make something slower. */
static inline void copy_row(char *out, const char *row, int64_t row_bytes) {
    if (row_bytes < LINE_BYTES) {
        memcpy(out, row, row_bytes);
        return;
    }
    for (int64_t at = 0; at + LINE_BYTES <= row_bytes; at += LINE_BYTES) copy_line(out + at, row + at, 0);
    if (row_bytes % LINE_BYTES) copy_line(out + row_bytes - LINE_BYTES, row + row_bytes - LINE_BYTES, 0);
}

/* As many as the processor can wait for at once. */
static inline void fetch_first_rows(const Copy *copy) {
    const int64_t num_bytes = copy->row_bytes < LONG_ROW_BYTES ? copy->row_bytes : HEAD_LINES * LINE_BYTES;
    int64_t lines = FETCHED_LINES;
    for (int64_t k = 0; k < copy->num_ids && lines > 0; k++, lines -= (num_bytes + LINE_BYTES - 1) / LINE_BYTES)
        fetch(row_at(copy, k), num_bytes);
}

static inline void copy_in_order(const Copy *copy, int stream, int64_t ahead) {
    const int64_t row_bytes = copy->row_bytes, num_ids = copy->num_ids;
    for (int64_t k = 0; k < ahead && k < num_ids; k++) fetch(row_at(copy, k), row_bytes);
    for (int64_t k = 0; k < num_ids; k++) {
        if (ahead && k + ahead < num_ids) fetch(row_at(copy, k + ahead), row_bytes);
        const char *row = row_at(copy, k);
        char *out = copy->out + k * copy->out_bytes;
        if (copy->decode) copy->decode((const uint8_t *)row, (float *)out, copy->out_bytes / (int64_t)sizeof(float));
        else if (stream) for (int64_t at = 0; at < row_bytes; at += LINE_BYTES) copy_line(out + at, row + at, 1);
        else if (row_bytes < LONG_ROW_BYTES) copy_row(out, row, row_bytes);
        else memcpy(out, row, row_bytes);
    }
}

static inline int64_t rows_ahead(int64_t row_bytes) {
    const int64_t ahead = AHEAD_BYTES / row_bytes;
    return ahead < AHEAD_ROWS_MIN ? AHEAD_ROWS_MIN : ahead > AHEAD_ROWS_MAX ? AHEAD_ROWS_MAX : ahead;
}

static inline void copy_beside(const Copy *copy, int stream, int beside) {
    const int64_t row_bytes = copy->row_bytes, num_ids = copy->num_ids, whole = row_bytes / LINE_BYTES * LINE_BYTES;
    int64_t k = 0;
    for (; k + beside <= num_ids; k += beside) {
        const char *rows[4];
        char *out = copy->out + k * row_bytes;
        for (int j = 0; j < beside; j++) {
            rows[j] = row_at(copy, k + j);
            if (k + 2 * beside <= num_ids) fetch(row_at(copy, k + beside + j), HEAD_LINES * LINE_BYTES);
        }
        for (int64_t at = 0; at < whole; at += LINE_BYTES)
            for (int j = 0; j < beside; j++) copy_line(out + j * row_bytes + at, rows[j] + at, stream);
        if (row_bytes > whole)
            for (int j = 0; j < beside; j++)
                copy_line(out + (j + 1) * row_bytes - LINE_BYTES, rows[j] + row_bytes - LINE_BYTES, 0);
    }
    for (; k < num_ids; k++) copy_row(copy->out + k * row_bytes, row_at(copy, k), row_bytes);
}

/* Whether there is a choice: rows of less than a line, and rows of blocks, are copied one way alone. */
static inline int has_ways(const Copy *copy) { return !copy->decode && copy->row_bytes >= LINE_BYTES; }

/* Past the cache whole lines alone are stored, to places where lines begin. */
static inline int can_stream(const Copy *copy) {
#if defined(__x86_64__)
    return has_ways(copy) && copy->row_bytes % LINE_BYTES == 0 && (uintptr_t)copy->out % LINE_BYTES == 0;
#else
    (void)copy;
    return 0;
#endif
}

static inline int default_way(const Copy *copy, int stream) {
    if (!has_ways(copy) || copy->row_bytes < LONG_ROW_BYTES) return AHEAD;
    return !stream ? BESIDE_4 : (copy->row_bytes < APART_BYTES ? BESIDE_4 : BESIDE_2) + PAST_CACHE;
}

static void copy_by(const Copy *copy, int way) {
    switch (way) {
    case ONE_BY_ONE: copy_in_order(copy, 0, 0); break;
    case BESIDE_2: copy_beside(copy, 0, 2); break;
    case BESIDE_4: copy_beside(copy, 0, 4); break;
    case ONE_BY_ONE + PAST_CACHE: copy_in_order(copy, 1, 0); break;
    case AHEAD + PAST_CACHE: copy_in_order(copy, 1, rows_ahead(copy->row_bytes)); break;
    case BESIDE_2 + PAST_CACHE: copy_beside(copy, 1, 2); break;
    case BESIDE_4 + PAST_CACHE: copy_beside(copy, 1, 4); break;
    default: copy_in_order(copy, 0, rows_ahead(copy->row_bytes));
    }
#if defined(__x86_64__)
    if (way >= PAST_CACHE) _mm_sfence();
#endif
}

/* The position of the first id outside 0 ... num_rows - 1, or -1. */
static int64_t first_outside(const Copy *copy, int64_t num_rows) {
    uint64_t above = 0;  /* without a branch, so that the compiler may take several at once */
    for (int64_t k = 0; k < copy->num_ids; k++) above |= (uint64_t)id_at(copy, k) >= (uint64_t)num_rows;
    if (!above) return -1;
    int64_t k = 0;
    while ((uint64_t)id_at(copy, k) < (uint64_t)num_rows) k++;
    return k;
}

#endif
