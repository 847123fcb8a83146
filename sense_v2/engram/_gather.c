/* Rows of a table, copied one after the other: the compiled form of `sense_v2.engram.reader`'s plain gather.

   gather(table, num_rows, row_bytes, ids, num_ids, id_bytes, out, num_threads) -> -1, or the position of the first
   id outside 0 ... num_rows - 1, in which case nothing is copied. `out` is a writable buffer of that many rows.

   read(plan, ids, num_ids, id_bytes, out) -> the same in one thread, but -2 where the table's file has been cut, in
   which case nothing is copied, and -3 where all is copied and took long. `plan` is a struct Plan as bytes.

   will_need(table, runs) -> 0, or the first error number. `runs` is a buffer of pairs of int64, (offset, length) in
   bytes from the table's beginning, whole pages: the kernel begins to read them.

   table and ids are addresses; the caller holds what lies there and has checked type, layout and size. The GIL is
   released meanwhile: a page that isn't in memory is waited for without it.

   What it gains over take or index_select: the next rows' cache lines are fetched while this one is copied (a random
   row is a cache and TLB miss), results too large for the cache are stored past it, and a small call is one call. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

enum {
    LINE_BYTES = 64,
    AHEAD_BYTES = 4096,        /* of rows, asked for before they are copied: some 64 lines are in flight */
    AHEAD_ROWS_MAX = 16,
    LONG_ROW_BYTES = 4096,     /* from here on the processor fetches ahead by itself: both of these lose */
    STREAM_BYTES = 32 << 20,   /* a larger result doesn't stay in the cache anyway */
    SHARE_BYTES = 8 << 20,     /* the least that a thread is started for: it begins with an empty cache */
    THREADS_MAX = 64,
};

typedef struct {
    const char *table, *ids;
    char *out;
    Py_ssize_t row_bytes, num_ids, id_bytes;
    int stream;
} Part;

static inline int64_t id_at(const char *ids, Py_ssize_t position, Py_ssize_t id_bytes) {
    return id_bytes == 8 ? ((const int64_t *)ids)[position] : ((const int32_t *)ids)[position];
}

static inline void fetch(const char *row, Py_ssize_t row_bytes) {
    for (Py_ssize_t at = 0; at < row_bytes; at += LINE_BYTES) __builtin_prefetch(row + at, 0, 0);
}

static inline void copy_row(char *out, const char *row, Py_ssize_t row_bytes, int stream) {
#if defined(__x86_64__)
    if (stream) {
        for (Py_ssize_t at = 0; at < row_bytes; at += LINE_BYTES) {
            const __m128i *from = (const __m128i *)(row + at);
            __m128i *to = (__m128i *)(out + at);
            __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
            __m128i c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
            _mm_stream_si128(to, a);
            _mm_stream_si128(to + 1, b);
            _mm_stream_si128(to + 2, c);
            _mm_stream_si128(to + 3, d);
        }
        return;
    }
#endif
    memcpy(out, row, row_bytes);
}

static void *copy_part(void *argument) {
    const Part *part = argument;
    const Py_ssize_t row_bytes = part->row_bytes, num_ids = part->num_ids, id_bytes = part->id_bytes;
    Py_ssize_t ahead = row_bytes >= LONG_ROW_BYTES ? 0 : AHEAD_BYTES / row_bytes;
    ahead = ahead > AHEAD_ROWS_MAX ? AHEAD_ROWS_MAX : ahead;
    for (Py_ssize_t k = 0; k < ahead && k < num_ids; k++)
        fetch(part->table + id_at(part->ids, k, id_bytes) * row_bytes, row_bytes);
    for (Py_ssize_t k = 0; k < num_ids; k++) {
        if (ahead && k + ahead < num_ids) fetch(part->table + id_at(part->ids, k + ahead, id_bytes) * row_bytes, row_bytes);
        copy_row(part->out + k * row_bytes, part->table + id_at(part->ids, k, id_bytes) * row_bytes, row_bytes,
                 part->stream);
    }
#if defined(__x86_64__)
    if (part->stream) _mm_sfence();
#endif
    return NULL;
}

static void copy_all(Part whole, long num_threads) {
    Py_ssize_t shares = whole.num_ids * whole.row_bytes / SHARE_BYTES;
    if (num_threads > shares) num_threads = shares;
    if (num_threads > THREADS_MAX) num_threads = THREADS_MAX;
    if (num_threads < 1) num_threads = 1;
    Part parts[THREADS_MAX];
    pthread_t threads[THREADS_MAX];
    int started[THREADS_MAX] = {0};
    for (long t = 0; t < num_threads; t++) {
        Py_ssize_t first = whole.num_ids * t / num_threads, end = whole.num_ids * (t + 1) / num_threads;
        parts[t] = whole;
        parts[t].ids += first * whole.id_bytes;
        parts[t].out += first * whole.row_bytes;
        parts[t].num_ids = end - first;
    }
    for (long t = 1; t < num_threads; t++) started[t] = pthread_create(&threads[t], NULL, copy_part, &parts[t]) == 0;
    copy_part(&parts[0]);
    for (long t = 1; t < num_threads; t++) {
        if (started[t]) pthread_join(threads[t], NULL);
        else copy_part(&parts[t]);
    }
}

enum { CUT = -2, SLOW = -3 };

typedef struct { int64_t table, num_rows, row_bytes, fd, file_bytes, slow_ns, slow_ns_per_row; } Plan;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

/* Whether the file is shorter than it was: a touch of a page behind its end is a SIGBUS. A system call takes as long as
   the rows of a small batch, so it is looked at once a millisecond. */
static int was_cut(const Plan *plan, int64_t now) {
    static int64_t looked_ns[1024];
    int64_t *looked = &looked_ns[plan->fd & 1023];
    if (now - __atomic_load_n(looked, __ATOMIC_RELAXED) < INT64_C(1000000)) return 0;
    struct stat found;
    if (fstat(plan->fd, &found) != 0 || found.st_size < plan->file_bytes) return 1;
    __atomic_store_n(looked, now, __ATOMIC_RELAXED);
    return 0;
}

/* Copies into `out`, a buffer; -1, the position of an id outside, or, with a plan, CUT or SLOW. NULL: an exception. */
static PyObject *gather_to(const Plan *plan, Part part, PyObject *out_object, long num_threads, int of_a_file) {
    Py_buffer out;
    if (PyObject_GetBuffer(out_object, &out, PyBUF_CONTIG) < 0) return NULL;
    if (out.len != part.num_ids * part.row_bytes) {
        PyErr_Format(PyExc_ValueError, "out has %zd bytes, not %zd rows of %zd", out.len, part.num_ids,
                     part.row_bytes);
        PyBuffer_Release(&out);
        return NULL;
    }
    Py_ssize_t result = -1;
    const uint64_t num_rows = (uint64_t)plan->num_rows;
    Py_BEGIN_ALLOW_THREADS
    int64_t started = of_a_file ? now_ns() : 0;
    uint64_t above = 0;  /* without a branch, so that the compiler may take several at once */
    for (Py_ssize_t k = 0; k < part.num_ids; k++) above |= (uint64_t)id_at(part.ids, k, part.id_bytes) >= num_rows;
    if (of_a_file && was_cut(plan, started)) {
        result = CUT;
    } else if (above) {
        for (result = 0; (uint64_t)id_at(part.ids, result, part.id_bytes) < num_rows; result++) {}
    } else {
        part.out = out.buf;
        part.stream = out.len >= STREAM_BYTES && part.row_bytes < LONG_ROW_BYTES && part.row_bytes % LINE_BYTES == 0 &&
                      (uintptr_t)out.buf % LINE_BYTES == 0;
        copy_all(part, num_threads);
        if (of_a_file && now_ns() - started > plan->slow_ns + plan->slow_ns_per_row * part.num_ids) result = SLOW;
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&out);
    return PyLong_FromSsize_t(result);
}

static PyObject *gather(PyObject *module, PyObject *const *arguments, Py_ssize_t num_arguments) {
    (void)module;
    if (num_arguments != 8) return PyErr_Format(PyExc_TypeError, "gather takes 8 arguments, not %zd", num_arguments);
    Plan plan = {.num_rows = PyLong_AsLongLong(arguments[1])};
    Part part = {.table = PyLong_AsVoidPtr(arguments[0]), .row_bytes = PyLong_AsSsize_t(arguments[2]),
                 .ids = PyLong_AsVoidPtr(arguments[3]), .num_ids = PyLong_AsSsize_t(arguments[4]),
                 .id_bytes = PyLong_AsSsize_t(arguments[5])};
    long num_threads = PyLong_AsLong(arguments[7]);
    if (PyErr_Occurred()) return NULL;
    return gather_to(&plan, part, arguments[6], num_threads, 0);
}

static PyObject *read_rows(PyObject *module, PyObject *const *arguments, Py_ssize_t num_arguments) {
    (void)module;
    if (num_arguments != 5) return PyErr_Format(PyExc_TypeError, "read takes 5 arguments, not %zd", num_arguments);
    if (!PyBytes_Check(arguments[0]) || PyBytes_GET_SIZE(arguments[0]) != sizeof(Plan))
        return PyErr_Format(PyExc_TypeError, "a plan has %zu bytes", sizeof(Plan));
    Plan plan;
    memcpy(&plan, PyBytes_AS_STRING(arguments[0]), sizeof plan);
    Part part = {.table = (const char *)(intptr_t)plan.table, .row_bytes = plan.row_bytes,
                 .ids = PyLong_AsVoidPtr(arguments[1]), .num_ids = PyLong_AsSsize_t(arguments[2]),
                 .id_bytes = PyLong_AsSsize_t(arguments[3])};
    if (PyErr_Occurred()) return NULL;
    return gather_to(&plan, part, arguments[4], 1, 1);
}

static PyObject *will_need(PyObject *module, PyObject *const *arguments, Py_ssize_t num_arguments) {
    (void)module;
    if (num_arguments != 2) return PyErr_Format(PyExc_TypeError, "will_need takes 2 arguments, not %zd", num_arguments);
    char *table = PyLong_AsVoidPtr(arguments[0]);
    if (PyErr_Occurred()) return NULL;
    Py_buffer runs;
    if (PyObject_GetBuffer(arguments[1], &runs, PyBUF_CONTIG_RO) < 0) return NULL;
    int error = 0;
    Py_BEGIN_ALLOW_THREADS
    const int64_t *run = runs.buf, *end = run + runs.len / (Py_ssize_t)(2 * sizeof(int64_t)) * 2;
    for (; run < end; run += 2)
        if (madvise(table + run[0], run[1], MADV_WILLNEED) && !error) error = errno;
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&runs);
    return PyLong_FromLong(error);
}

static PyMethodDef methods[] = {
    {"gather", (PyCFunction)(void (*)(void))gather, METH_FASTCALL, "Copies rows; see the top of _gather.c."},
    {"read", (PyCFunction)(void (*)(void))read_rows, METH_FASTCALL, "Copies rows of a file; see the top of _gather.c."},
    {"will_need", (PyCFunction)(void (*)(void))will_need, METH_FASTCALL, "Reads ahead; see the top of _gather.c."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_gather", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__gather(void) { return PyModule_Create(&definition); }
