/* The ceilings that benchmarks/lookup.py holds itself against, with nothing of the library in them.

   probe_gather: rows copied by memcpy or by stores past the cache, with or without fetching ahead, in a few threads.
   probe_reads: random reads of 4 KiB past the page cache, `depth` in flight in each of `jobs` threads (Linux AIO). */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/aio_abi.h>
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

typedef struct { const char *table; const int64_t *ids; char *out; long row_bytes, num_ids; int stream, ahead; } Work;

static void *copy(void *argument) {
    Work w = *(Work *)argument;
    for (long k = 0; k < w.num_ids; k++) {
        if (w.ahead && k + w.ahead < w.num_ids)
            for (long at = 0; at < w.row_bytes; at += 64)
                __builtin_prefetch(w.table + w.ids[k + w.ahead] * w.row_bytes + at, 0, 0);
        const char *row = w.table + w.ids[k] * w.row_bytes;
        char *out = w.out + k * w.row_bytes;
#if defined(__x86_64__)
        if (w.stream) {
            for (long at = 0; at < w.row_bytes; at += 16)
                _mm_stream_si128((__m128i *)(out + at), _mm_loadu_si128((const __m128i *)(row + at)));
            continue;
        }
#endif
        memcpy(out, row, w.row_bytes);
    }
    return NULL;
}

void probe_gather(const char *table, long row_bytes, const int64_t *ids, long num_ids, char *out, int threads,
                  int stream, int ahead) {
    Work works[16];
    pthread_t started[16];
    for (int t = 0; t < threads; t++) {
        long first = num_ids * t / threads, end = num_ids * (t + 1) / threads;
        works[t] = (Work){table, ids + first, out + first * row_bytes, row_bytes, end - first, stream, ahead};
        if (t) pthread_create(&started[t], NULL, copy, &works[t]);
    }
    copy(&works[0]);
    for (int t = 1; t < threads; t++) pthread_join(started[t], NULL);
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
