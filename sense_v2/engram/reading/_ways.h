/* Large results: shared out over PyTorch's threads, copied the way that is the fastest on this machine.

   Which way that is (`_copy.h`) is measured, not assumed, and on the copies themselves: a large result is made of
   pieces of PIECE_BYTES, and while nothing is known of rows of this width, the pieces are copied by the ways in turn
   and timed. Each way copies the same bytes, so nothing is copied twice; what it costs is that TIMINGS pieces of each
   way, 16 MiB in all, once for a width in a process, are copied at the ways' average speed: some milliseconds. They
   are spread over several results, since what else the machine does comes in bursts. A piece that met a page fault, or
   was interrupted, isn't counted. The way whose fastest piece was the fastest is kept,
   or the usual one where that was less than 5 % slower.

   Small results stay in the cache, for who reads them next: stores past it are tried for results of STREAM_BYTES.

   The threads are PyTorch's own, through the OpenMP library that it brings: the others are still spinning after its
   last operation, and a thread of ours would wait for their processors. They take piece after piece, so that one that
   the system keeps waiting holds up no more than its own. Where there is no such library, and in a forked child, which
   has none of its threads, one thread copies. */

#ifndef SENSE_WAYS_H
#define SENSE_WAYS_H

#include <dlfcn.h>
#include <pthread.h>
#include <sys/resource.h>
#include <time.h>

#include "_copy.h"

enum {
    STREAM_BYTES = 32 << 20,
    SHARE_BYTES = 512 << 10,  /* the least that a thread is woken for */
    PIECE_BYTES = 256 << 10,
    TIMINGS = 8, ROUNDS = 2,  /* of each way; of them in one result */
    WIDTHS = 16,              /* of rows, of which something is known at once */
};

static const double GAIN = 0.95;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

/* What is known of the ways for rows of one width, of results that are stored past the cache or not. */
typedef struct {
    int64_t row_bytes;  /* 0: of none yet */
    int stream, way;    /* -1 while it isn't known */
    int64_t turn;       /* pieces that were timed, or could have been */
    int num[WAYS];
    double ns_per_row[WAYS][TIMINGS];
} Known;

static struct {
    char taken;  /* by a thread. Who can't have it does without */
    int fixed;   /* the way for all, or -1 */
    int oldest;
    Known widths[WIDTHS];
} ways = {.fixed = -1};

static int take_ways(void) { return !__atomic_test_and_set(&ways.taken, __ATOMIC_ACQUIRE); }
static void leave_ways(void) { __atomic_clear(&ways.taken, __ATOMIC_RELEASE); }

/* While they are taken. */
static Known *known_of(int64_t row_bytes, int stream) {
    for (int k = 0; k < WIDTHS; k++)
        if (ways.widths[k].row_bytes == row_bytes && ways.widths[k].stream == stream) return &ways.widths[k];
    Known *known = &ways.widths[ways.oldest];
    ways.oldest = (ways.oldest + 1) % WIDTHS;
    *known = (Known){.row_bytes = row_bytes, .stream = stream, .way = -1};
    return known;
}

static double least_of(const double *timings) {
    double least = timings[0];
    for (int k = 1; k < TIMINGS; k++)
        if (timings[k] < least) least = timings[k];
    return least;
}

/* How many ways there are to try. */
static int ways_of(const Known *known) { return known->stream ? WAYS : PAST_CACHE; }

/* The way of the least time; each has all its timings. The usual one where the gain is small enough to be chance. */
static int fastest(const Known *known, int usual) {
    int best = usual;
    for (int way = 0; way < ways_of(known); way++)
        if (least_of(known->ns_per_row[way]) < least_of(known->ns_per_row[best])) best = way;
    return least_of(known->ns_per_row[best]) < GAIN * least_of(known->ns_per_row[usual]) ? best : usual;
}

/* PyTorch's threads */

static struct { void (*run)(void (*)(void *), void *, unsigned, unsigned); } openmp;

/* In a forked child. */
static void leave_threads(void) {
    openmp.run = NULL;
    leave_ways();
}

static void find_threads(void) {
    /* PyTorch makes the library's names known to the whole process. A pointer to data becomes one to a function. */
    *(void **)&openmp.run = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    if (pthread_atfork(NULL, NULL, leave_threads)) leave_threads();
}

/* A result */

typedef struct {
    Copy copy;
    int64_t piece_rows, next;  /* the next piece that nobody has taken */
    int way;                   /* of pieces that aren't timed */
    int missing;               /* timings, before the fastest way is known */
    int64_t tries;             /* pieces from the first one on that are timed */
    Known known;
} Shared;

typedef struct { long faults, switches; } Disturbed;

static Disturbed disturbed(void) {
#if defined(RUSAGE_THREAD)
    struct rusage usage;
    if (getrusage(RUSAGE_THREAD, &usage) == 0)
        return (Disturbed){usage.ru_minflt + usage.ru_majflt, usage.ru_nvcsw + usage.ru_nivcsw};
#endif
    return (Disturbed){0, 0};
}

static void copy_timed(Shared *shared, const Copy *piece, int way) {
    const Disturbed before = disturbed();
    const int64_t started = now_ns();
    copy_by(piece, way);
    const int64_t took = now_ns() - started;
    const Disturbed after = disturbed();
    if (after.faults != before.faults || after.switches != before.switches) return;
    Known *known = &shared->known;
    const int at = __atomic_fetch_add(&known->num[way], 1, __ATOMIC_RELAXED);
    if (at >= TIMINGS) return;
    known->ns_per_row[way][at] = (double)took / (double)piece->num_ids;
    if (__atomic_sub_fetch(&shared->missing, 1, __ATOMIC_ACQ_REL) == 0) {
        known->way = fastest(known, default_way(&shared->copy, known->stream));
        __atomic_store_n(&shared->way, known->way, __ATOMIC_RELEASE);
    }
}

static void copy_pieces(void *argument) {
    Shared *shared = argument;
    for (;;) {
        const int64_t number = __atomic_fetch_add(&shared->next, 1, __ATOMIC_RELAXED);
        const int64_t first = number * shared->piece_rows;
        if (first >= shared->copy.num_ids) return;
        Copy piece = shared->copy;
        piece.ids += first * piece.id_bytes;
        piece.out += first * piece.out_bytes;
        piece.num_ids = piece.num_ids - first < shared->piece_rows ? piece.num_ids - first : shared->piece_rows;
        if (number < shared->tries && __atomic_load_n(&shared->missing, __ATOMIC_ACQUIRE) > 0)
            copy_timed(shared, &piece, (int)((shared->known.turn + number) % ways_of(&shared->known)));
        else copy_by(&piece, __atomic_load_n(&shared->way, __ATOMIC_ACQUIRE));
    }
}

/* What is known of the ways of this copy, and which one is the best as far as that goes. */
static void choose_way(Shared *shared, int stream) {
    const Copy *copy = &shared->copy;
    shared->known = (Known){.row_bytes = copy->row_bytes, .stream = stream, .way = -1};
    shared->way = default_way(copy, stream);
    if (!has_ways(copy) || !take_ways()) return;
    if (ways.fixed >= 0) {
        shared->way = stream ? ways.fixed : ways.fixed % PAST_CACHE;
    } else {
        Known *known = known_of(copy->row_bytes, stream);
        shared->known = *known;
        if (known->way >= 0) {
            shared->way = known->way;
        } else {
            const int64_t num_pieces = (copy->num_ids + shared->piece_rows - 1) / shared->piece_rows;
            shared->tries = ROUNDS * ways_of(known) < num_pieces ? ROUNDS * ways_of(known) : num_pieces;
            known->turn += shared->tries;
            for (int way = 0; way < ways_of(known); way++)
                shared->missing += known->num[way] < TIMINGS ? TIMINGS - known->num[way] : 0;
        }
    }
    leave_ways();
}

static void copy_all(Copy copy, long max_threads) {
    const int64_t num_bytes = copy.num_ids * copy.out_bytes;
    const int64_t shares = num_bytes / SHARE_BYTES;
    if (shares < 1) {
        copy_by(&copy, default_way(&copy, 0));
        return;
    }
    const long num_threads = shares < max_threads ? (long)shares : max_threads;
    Shared shared = {.copy = copy, .piece_rows = copy.out_bytes < PIECE_BYTES ? PIECE_BYTES / copy.out_bytes : 1};
    choose_way(&shared, num_bytes >= STREAM_BYTES && can_stream(&copy));
    const int is_measured = shared.missing > 0;
    if (openmp.run && num_threads > 1) openmp.run(copy_pieces, &shared, (unsigned)num_threads, 0);
    else copy_pieces(&shared);
    if (is_measured && take_ways()) {
        Known *known = known_of(copy.row_bytes, shared.known.stream);
        shared.known.turn = known->turn;
        *known = shared.known;
        leave_ways();
    }
}

#endif
