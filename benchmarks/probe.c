/* The ceilings that benchmarks/lookup.py holds itself against, with nothing of the library in them.

   probe_gather: rows copied by memcpy, by memcpy with the next eight rows asked for, or four side by side, by ordinary
   stores or by stores past the cache, in one thread or several (OpenMP: PyTorch's own pool, where that is in memory).
   probe_reads: random reads of 4 KiB past the page cache, `depth` in flight in each of `jobs` threads (Linux AIO). */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <omp.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

enum { ONE_BY_ONE, AHEAD, BESIDE, ROWS_AHEAD = 8, ROWS_BESIDE = 4 };

static inline void line(char *out, const char *row, int stream) {
#if defined(__x86_64__)
    for (int at = 0; at < 64; at += 16) {
        __m128i part = _mm_loadu_si128((const __m128i *)(row + at));
        if (stream) _mm_stream_si128((__m128i *)(out + at), part);
        else _mm_storeu_si128((__m128i *)(out + at), part);
    }
#else
    (void)stream;
    memcpy(out, row, 64);
#endif
}

static inline void beside(const char *table, long row_bytes, const int64_t *ids, long num_ids, char *out, int stream) {
    for (long k = 0; k + ROWS_BESIDE <= num_ids; k += ROWS_BESIDE)
        for (long at = 0; at < row_bytes; at += 64)
            for (int j = 0; j < ROWS_BESIDE; j++)
                line(out + (k + j) * row_bytes + at, table + ids[k + j] * row_bytes + at, stream);
    for (long k = num_ids / ROWS_BESIDE * ROWS_BESIDE; k < num_ids; k++)
        memcpy(out + k * row_bytes, table + ids[k] * row_bytes, row_bytes);
}

static void copy(const char *table, long row_bytes, const int64_t *ids, long num_ids, char *out, int way, int stream) {
    if (way == BESIDE) {
        if (stream) beside(table, row_bytes, ids, num_ids, out, 1);
        else beside(table, row_bytes, ids, num_ids, out, 0);
        return;
    }
    for (long k = 0; k < num_ids; k++) {
        if (way == AHEAD && k + ROWS_AHEAD < num_ids)
            for (long at = 0; at < row_bytes; at += 64)
                __builtin_prefetch(table + ids[k + ROWS_AHEAD] * row_bytes + at);
        if (stream) {
            for (long at = 0; at < row_bytes; at += 64)
                line(out + k * row_bytes + at, table + ids[k] * row_bytes + at, 1);
        } else {
            memcpy(out + k * row_bytes, table + ids[k] * row_bytes, row_bytes);
        }
    }
}

/* Rows are whole cache lines. */
void probe_gather(const char *table, long row_bytes, const int64_t *ids, long num_ids, char *out, int threads, int way,
                  int stream) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        long number = omp_get_thread_num(), count = omp_get_num_threads();
        long first = num_ids * number / count, end = num_ids * (number + 1) / count;
        copy(table, row_bytes, ids + first, end - first, out + first * row_bytes, way, stream);
    }
}

enum { BLOCK = 4096, DEPTH_MAX = 256 };
typedef struct { int fd, depth; int64_t blocks; double seconds; uint64_t seed, done; } Job;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void *reads(void *argument) {
    Job *job = argument;
    aio_context_t context = 0;
    struct iocb blocks[DEPTH_MAX], *pointers[DEPTH_MAX];
    struct io_event events[DEPTH_MAX];
    char *memory = NULL;
    if (syscall(SYS_io_setup, job->depth, &context) || posix_memalign((void **)&memory, BLOCK, BLOCK * job->depth))
        return NULL;
    uint64_t state = job->seed | 1;
    for (int k = 0; k < job->depth; k++) pointers[k] = &blocks[k];
    int ready = job->depth;
    double end = now() + job->seconds;
    while (now() < end) {
        for (int k = 0; k < ready; k++) {
            state ^= state << 13; state ^= state >> 7; state ^= state << 17;
            struct iocb *block = pointers[k];
            int at = block - blocks;
            memset(block, 0, sizeof *block);
            block->aio_lio_opcode = IOCB_CMD_PREAD;
            block->aio_fildes = job->fd;
            block->aio_buf = (uint64_t)(memory + BLOCK * at);
            block->aio_nbytes = BLOCK;
            block->aio_offset = (int64_t)(state % job->blocks) * BLOCK;
        }
        if (syscall(SYS_io_submit, context, ready, pointers) != ready) break;
        ready = syscall(SYS_io_getevents, context, 1, job->depth, events, NULL);
        if (ready < 0) break;
        for (int k = 0; k < ready; k++) pointers[k] = (struct iocb *)events[k].obj;
        job->done += ready;
    }
    syscall(SYS_io_destroy, context);
    free(memory);
    return NULL;
}

/* Reads a second; negative where the file can't be opened past the page cache. */
double probe_reads(const char *path, int64_t file_bytes, int depth, int jobs, double seconds) {
    int fd = open(path, O_RDONLY | O_DIRECT);
    if (fd < 0) return -1;
    Job all[16];
    pthread_t threads[16];
    double start = now();
    for (int j = 0; j < jobs; j++) {
        all[j] = (Job){fd, depth, file_bytes / BLOCK, seconds, 0x9E3779B97F4A7C15ull * (j + 1), 0};
        pthread_create(&threads[j], NULL, reads, &all[j]);
    }
    uint64_t done = 0;
    for (int j = 0; j < jobs; j++) { pthread_join(threads[j], NULL); done += all[j].done; }
    double taken = now() - start;
    close(fd);
    return done / taken;
}
