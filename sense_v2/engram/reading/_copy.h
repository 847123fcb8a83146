/* Rows of a table, copied or decoded one after the other into a result. No Python in here.

   A random row is a miss of the cache and of the TLB, so what counts is how many lines are on their way at once. Short
   rows are copied one by one, the lines of the next ones asked for ahead. Of a long row the processor would fetch the
   next lines by itself, but only along one row at a time: four are copied side by side, a line of each in turn. A
   result too large for the cache is stored past it, long rows then two by two: stores past the cache to four places
   half a page apart, or a page, wait for each other on some processors (3.6 times as long on an AMD EPYC). Rows of
   blocks (`_blocks.h`) are short, and decoded one by one as short rows are copied.

   Large results are shared out over PyTorch's own threads, through the OpenMP library that it brings: the others are
   still spinning after its last operation, and a thread of ours would wait for their processors. Where there is no
   such library, and in a forked child, which has none of its threads, one thread copies. */

#ifndef SENSE_COPY_H
#define SENSE_COPY_H

#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "_blocks.h"

enum {
    LINE_BYTES = 64,
    AHEAD_BYTES = 2048, AHEAD_ROWS_MIN = 8, AHEAD_ROWS_MAX = 32,  /* of short rows, asked for before they are copied */
    LONG_ROW_BYTES = 1024, BESIDE = 4, HEAD_LINES = 2,
    APART_BYTES = 2048, APART_BESIDE = 2,  /* of rows stored past the cache */
    FETCHED_LINES = 64,
    STREAM_BYTES = 32 << 20,
    SHARE_BYTES = 512 << 10,  /* the least that a thread is woken for */
};

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

static void copy_short_rows(const Copy *copy) {
    const int64_t row_bytes = copy->row_bytes, num_ids = copy->num_ids;
    int64_t ahead = AHEAD_BYTES / row_bytes;
    ahead = ahead < AHEAD_ROWS_MIN ? AHEAD_ROWS_MIN : ahead > AHEAD_ROWS_MAX ? AHEAD_ROWS_MAX : ahead;
    for (int64_t k = 0; k < ahead && k < num_ids; k++) fetch(row_at(copy, k), row_bytes);
    for (int64_t k = 0; k < num_ids; k++) {
        if (k + ahead < num_ids) fetch(row_at(copy, k + ahead), row_bytes);
        char *out = copy->out + k * copy->out_bytes;
        if (copy->decode)
            copy->decode((const uint8_t *)row_at(copy, k), (float *)out, copy->out_bytes / (int64_t)sizeof(float));
        else copy_row(out, row_at(copy, k), row_bytes);
    }
}

static inline void copy_long_rows(const Copy *copy, int stream, int beside) {
    const int64_t row_bytes = copy->row_bytes, num_ids = copy->num_ids, whole = row_bytes / LINE_BYTES * LINE_BYTES;
    int64_t k = 0;
    for (; k + beside <= num_ids; k += beside) {
        const char *rows[BESIDE];
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

static void copy_rows(const Copy *copy, int stream) {
    if (copy->row_bytes < LONG_ROW_BYTES || copy->decode) {
        copy_short_rows(copy);
    } else if (stream) {
        if (copy->row_bytes < APART_BYTES) copy_long_rows(copy, 1, BESIDE);
        else copy_long_rows(copy, 1, APART_BESIDE);
#if defined(__x86_64__)
        _mm_sfence();
#endif
    } else {
        copy_long_rows(copy, 0, BESIDE);
    }
}

/* PyTorch's threads */

static struct {
    void (*run)(void (*)(void *), void *, unsigned, unsigned);
    int (*number)(void), (*count)(void);
} openmp;

static void leave_threads(void) { openmp.run = NULL; }

static void find_threads(void) {
    /* PyTorch makes the library's names known to the whole process. A pointer to data becomes one to a function. */
    *(void **)&openmp.run = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    *(void **)&openmp.number = dlsym(RTLD_DEFAULT, "omp_get_thread_num");
    *(void **)&openmp.count = dlsym(RTLD_DEFAULT, "omp_get_num_threads");
    if (!openmp.number || !openmp.count || pthread_atfork(NULL, NULL, leave_threads)) leave_threads();
}

typedef struct { Copy copy; int stream; } Shared;

static void copy_share(void *argument) {
    const Shared *shared = argument;
    const int64_t number = openmp.number(), count = openmp.count();
    Copy part = shared->copy;
    const int64_t first = part.num_ids * number / count, end = part.num_ids * (number + 1) / count;
    part.ids += first * part.id_bytes;
    part.out += first * part.out_bytes;
    part.num_ids = end - first;
    copy_rows(&part, shared->stream);
}

static void copy_all(Copy copy, long max_threads) {
    const int64_t num_bytes = copy.num_ids * copy.out_bytes;
    const int64_t shares = num_bytes / SHARE_BYTES;
    const long num_threads = shares < max_threads ? (long)shares : max_threads;
    const int stream = num_bytes >= STREAM_BYTES && copy.row_bytes % LINE_BYTES == 0 &&
                       (uintptr_t)copy.out % LINE_BYTES == 0;
    Shared shared = {copy, stream};
    if (openmp.run && num_threads > 1) openmp.run(copy_share, &shared, (unsigned)num_threads, 0);
    else copy_rows(&copy, stream);
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
