/* Rows of a table by their ids: the compiled form of `gather`, and all of a small batch.

   What `sense_v2.engram.reading.gather` does, and what `reader` and `pages` do for a small batch.

   Lookup(rows, num_rows, width, type_code, type_bits, exchange, tensor_class, fd, file_bytes, slow_ns, slow_ns_per_row,
          blocks)
       Of a table in memory. `rows` is its buffer, which stays alive as long as this does; `exchange` is PyTorch's table
       of DLPack functions; fd is that of the mapped file, or -1. `blocks` is 0, or the number of the blocks that rows
       have (`_blocks.h`): results are then of 32-bit floats.

   Lookup.read(row_ids) -> rows, or None
       A small batch in one call: 16 warm rows take about as long as a few calls of Python functions. While
       `batches_to_ask` isn't 0 the kernel is asked first, as by `prefetch`: a batch that found all in memory takes one
       off that number, one that didn't makes it `batches_after_cold`.
       None for everything else, for which the caller has another way: ids that aren't a contiguous CPU tensor of int64
       or int32, many of them (with `batches_to_ask`, more than a few, or any where `batches_after_cold` is 0), one
       outside of the table, a file that was cut; and every batch while `slow` is set. Sets `slow` where rows took
       longer than rows in memory can.

   Lookup.gather(row_ids, num_threads) -> rows, or the position of the first id outside, or None
       Any number of them. None for ids as above, and where there is no memory.

   Lookup.looks_cold(row_ids) -> whether one of a few of the rows isn't in memory, or None where that can't be known.

   Lookup.prefetch(row_ids) -> whether nothing is left to do: while `batches_to_ask` isn't 0 the kernel begins to read
       the pages of these rows that aren't in memory; after that all of a small batch is taken to be. False for what
       `read` has None for.

   Lookup.counts() -> lookups of `read`, their rows, how many of them asked, the slow ones by how long they took (below
       1 us, 2, 4, …), and the nanoseconds of these.

   gather(table, num_rows, row_bytes, ids, num_ids, id_bytes, out, num_threads, width, blocks) -> -1, or the position of
       the first id outside, in which case nothing is copied. table and ids are addresses that the caller has checked;
       `out` is a writable buffer of that many rows: of the table's bytes, or, of rows of blocks, of `width` floats.

   will_need(table, runs) -> 0, or the first error number. `runs` is a buffer of pairs of int64, (offset, length) in
       bytes from the table's beginning, whole pages: the kernel begins to read them.

   fix_way(way), fix_way(-1): large results are copied this way (`_copy.h` numbers them) from now on; or, as at the
   start, the way that is found to be the fastest. A way past the cache counts where a result is stored past it.

   found_ways() -> [(row_bytes, whether past the cache is allowed, way or -1, [nanoseconds a row, of each way]), …]:
   what is known of the ways; 0 nanoseconds where nothing is yet.

   The GIL is released meanwhile: a page that isn't in memory is waited for without it.

   Of Python's C API, only what is in the limited one: a wheel has one build for every Python (setup.py). */

#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <structmember.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "_results.h"
#include "_ways.h"

enum {
    INTERFACE = 6,                            /* one more with each change of what this file offers */
    SMALL_IDS = 1023, SMALL_BYTES = 1 << 20,  /* of a batch that is read without a look at anything else */
    LOOK_NS = 1000000,                        /* between two looks at the file's size */
    SAMPLES = 4, ASKED_IDS = 64,
    PAGES_OF_A_ROW = 64,
};

enum { WAIT_BUCKETS = 24 };  /* below 1 us, 2, 4, …: those of read_stats.py */

typedef struct {
    PyObject_HEAD
    Py_buffer rows;
    PyTypeObject *tensor_class;
    const DLExchange *exchange;
    int64_t num_rows, row_bytes, out_bytes, width, file_bytes, slow_ns, slow_ns_per_row, looked_ns;
    DecodeRow decode;
    DLType dtype;
    int fd, batches_to_ask, batches_after_cold;
    char slow;
    long long calls, rows_read, asked, waits[WAIT_BUCKETS], waited_ns;
} Lookup;

/* Whether the file is shorter than it was: a touch of a page behind its end is a SIGBUS. A system call takes as long as
   the rows of a small batch, so it is looked at once a millisecond. */
static int was_cut(Lookup *self, int64_t now) {
    if (now - __atomic_load_n(&self->looked_ns, __ATOMIC_RELAXED) < LOOK_NS) return 0;
    struct stat found;
    if (fstat(self->fd, &found) != 0 || found.st_size < self->file_bytes) return 1;
    __atomic_store_n(&self->looked_ns, now, __ATOMIC_RELAXED);
    return 0;
}

/* Whether row_ids can be read as they are; then `ids` says where they lie, and `copy` all but where they go to. */
static int view_ids(const Lookup *self, PyObject *row_ids, DLTensor *ids, Copy *copy) {
    if (Py_TYPE(row_ids) != self->tensor_class) return 0;
    if (self->exchange->view(row_ids, ids) != 0) {
        PyErr_Clear();  /* a tensor without memory, of a transform: what it is, the other way will say */
        return 0;
    }
    if (ids->device.type != DL_CPU || ids->dtype.code != 0 || ids->dtype.lanes != 1 || ids->ndim >= DIMS_MAX) return 0;
    if (ids->dtype.bits != 64 && ids->dtype.bits != 32) return 0;
    int64_t num_ids = 1;
    for (int dim = ids->ndim - 1; dim >= 0; dim--) {
        if (ids->strides && ids->strides[dim] != num_ids && ids->shape[dim] != 1) return 0;
        num_ids *= ids->shape[dim];
    }
    *copy = (Copy){.table = self->rows.buf, .ids = (const char *)ids->data + ids->byte_offset,
                   .row_bytes = self->row_bytes, .num_ids = num_ids, .id_bytes = ids->dtype.bits / 8,
                   .out_bytes = self->out_bytes, .decode = self->decode};
    return 1;
}

static PyObject *as_tensor(const Lookup *self, Result *result) {
    void *tensor = NULL;
    return self->exchange->to_object(&result->managed, &tensor) == 0 ? tensor : NULL;
}

typedef struct { char *first; size_t num_bytes; } Pages;

static Pages pages_of(const char *row, int64_t row_bytes) {
    const uintptr_t page_bytes = (uintptr_t)sysconf(_SC_PAGESIZE);
    char *first = (char *)((uintptr_t)row / page_bytes * page_bytes);
    const size_t num_bytes = (uintptr_t)row + row_bytes - (uintptr_t)first;
    return (Pages){first, (num_bytes + page_bytes - 1) / page_bytes * page_bytes};
}

/* 1 where all of them are in memory, 0 where one isn't, -1 where that can't be known. */
static int in_memory(Pages pages) {
#if defined(__linux__)
    unsigned char found[PAGES_OF_A_ROW];
    const size_t num_pages = pages.num_bytes / (size_t)sysconf(_SC_PAGESIZE);
    if (num_pages > PAGES_OF_A_ROW || mincore(pages.first, pages.num_bytes, found)) return -1;
    for (size_t page = 0; page < num_pages; page++)
        if (!(found[page] & 1)) return 0;
    return 1;
#else
    (void)pages;
    return -1;
#endif
}

/* The kernel begins to read the pages of these rows that aren't in memory: of how many rows, or -1 where it refuses. */
static long ask_for_rows(const Copy *copy) {
    long asked = 0;
    for (int64_t k = 0; k < copy->num_ids; k++) {
        const Pages pages = pages_of(row_at(copy, k), copy->row_bytes);
        if (in_memory(pages) == 1) continue;
        if (madvise(pages.first, pages.num_bytes, MADV_WILLNEED)) return -1;
        asked++;
    }
    return asked;
}

static PyObject *lookup_read(Lookup *self, PyObject *row_ids) {
    DLTensor ids;
    Copy copy;
    if (self->slow || !view_ids(self, row_ids, &ids, &copy)) Py_RETURN_NONE;
    if (copy.num_ids > SMALL_IDS || copy.num_ids * copy.out_bytes > SMALL_BYTES) Py_RETURN_NONE;
    if (self->batches_to_ask && (copy.num_ids > ASKED_IDS || !self->batches_after_cold)) Py_RETURN_NONE;
    if (first_outside(&copy, self->num_rows) >= 0) Py_RETURN_NONE;
    const int64_t started = now_ns();
    if (was_cut(self, started)) Py_RETURN_NONE;
    long asked = 0;
    if (self->batches_to_ask) {
        Py_BEGIN_ALLOW_THREADS
        asked = ask_for_rows(&copy);
        Py_END_ALLOW_THREADS
        if (asked < 0) Py_RETURN_NONE;
        if (asked) self->batches_to_ask = self->batches_after_cold;
        else if (self->batches_to_ask > 0) self->batches_to_ask--;  /* another thread may have been here, too */
    }
    fetch_first_rows(&copy);  /* they come while the tensor is made */
    Result *result = take_result(copy.num_ids * copy.out_bytes);
    if (!result) Py_RETURN_NONE;
    shape_result(result, &ids, self->width, self->dtype);
    copy.out = result->memory;
    PyObject *rows = as_tensor(self, result);
    if (!rows) return NULL;
    int64_t took;
    Py_BEGIN_ALLOW_THREADS
    copy_by(&copy, default_way(&copy, 0));
    took = now_ns() - started;
    Py_END_ALLOW_THREADS
    self->calls++, self->rows_read += copy.num_ids, self->asked += asked != 0;
    if (took > self->slow_ns + self->slow_ns_per_row * copy.num_ids) {
        if (!asked) self->slow = 1;
        int bucket = 0;
        while (bucket < WAIT_BUCKETS - 1 && took >= INT64_C(1000) << bucket) bucket++;
        self->waits[bucket]++, self->waited_ns += took;
    }
    return rows;
}

static PyObject *lookup_gather(Lookup *self, PyObject *const *arguments, Py_ssize_t num_arguments) {
    if (num_arguments != 2) return PyErr_Format(PyExc_TypeError, "gather takes 2 arguments, not %zd", num_arguments);
    const long max_threads = PyLong_AsLong(arguments[1]);
    if (PyErr_Occurred()) return NULL;
    DLTensor ids;
    Copy copy;
    if (!view_ids(self, arguments[0], &ids, &copy)) Py_RETURN_NONE;
    int64_t outside;
    Py_BEGIN_ALLOW_THREADS
    outside = first_outside(&copy, self->num_rows);
    Py_END_ALLOW_THREADS
    if (outside >= 0) return PyLong_FromLongLong(outside);
    Result *result = take_result(copy.num_ids * copy.out_bytes);
    if (!result) Py_RETURN_NONE;
    shape_result(result, &ids, self->width, self->dtype);
    copy.out = result->memory;
    Py_BEGIN_ALLOW_THREADS
    copy_all(copy, max_threads);
    Py_END_ALLOW_THREADS
    return as_tensor(self, result);
}

static PyObject *lookup_looks_cold(Lookup *self, PyObject *row_ids) {
    DLTensor ids;
    Copy copy;
    if (!view_ids(self, row_ids, &ids, &copy)) Py_RETURN_NONE;
    int found = 1;
    for (int64_t k = 0; k < SAMPLES && k < copy.num_ids && found > 0; k++) {
        const int64_t id = id_at(&copy, copy.num_ids < SAMPLES ? k : k * (copy.num_ids / SAMPLES));
        if (id >= 0 && id < self->num_rows)
            found = in_memory(pages_of(copy.table + id * copy.row_bytes, copy.row_bytes));
    }
    if (found < 0) Py_RETURN_NONE;
    return PyBool_FromLong(!found);
}

static PyObject *lookup_prefetch(Lookup *self, PyObject *row_ids) {
    DLTensor ids;
    Copy copy;
    if (self->slow || !view_ids(self, row_ids, &ids, &copy)) Py_RETURN_FALSE;
    if (copy.num_ids > SMALL_IDS || first_outside(&copy, self->num_rows) >= 0 || was_cut(self, now_ns()))
        Py_RETURN_FALSE;
    if (!self->batches_to_ask) Py_RETURN_TRUE;
    if (copy.num_ids > ASKED_IDS || !self->batches_after_cold) Py_RETURN_FALSE;
    long asked;
    Py_BEGIN_ALLOW_THREADS
    asked = ask_for_rows(&copy);
    Py_END_ALLOW_THREADS
    if (asked > 0) self->batches_to_ask = self->batches_after_cold;
    return PyBool_FromLong(asked >= 0);
}

/* Bytes of a row of `width` values in such blocks, the last of which may have values too many. */
static int64_t bytes_in_blocks(int64_t width, const Blocks *blocks) {
    return (width / blocks->block_values + (width % blocks->block_values != 0)) * blocks->block_bytes;
}

/* The blocks of that number, NULL for 0, or an error. */
static int find_blocks(long number, const Blocks **blocks) {
    *blocks = blocks_of(number);
    if (number == 0 || *blocks) return 1;
    PyErr_Format(PyExc_ValueError, "there are no blocks of number %ld", number);
    return 0;
}

static PyObject *lookup_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    if (keywords && PyDict_Size(keywords)) return PyErr_Format(PyExc_TypeError, "Lookup takes no keywords");
    PyObject *rows, *exchange_capsule, *tensor_class;
    long long num_rows, width, file_bytes, slow_ns, slow_ns_per_row;
    int code, bits, fd, number;
    const Blocks *blocks;
    if (!PyArg_ParseTuple(arguments, "OLLiiOO!iLLLi", &rows, &num_rows, &width, &code, &bits, &exchange_capsule,
                          &PyType_Type, &tensor_class, &fd, &file_bytes, &slow_ns, &slow_ns_per_row, &number))
        return NULL;
    if (!find_blocks(number, &blocks)) return NULL;
    const DLExchange *exchange = PyCapsule_GetPointer(exchange_capsule, "dlpack_exchange_api");
    if (!exchange) return NULL;
    if (exchange->version.major != DL_MAJOR || !exchange->view || !exchange->to_object)
        return PyErr_Format(PyExc_NotImplementedError, "DLPack %u, not %d", exchange->version.major, DL_MAJOR);
    Lookup *self = (Lookup *)PyType_GenericAlloc(type, 0);
    if (!self) return NULL;
    if (PyObject_GetBuffer(rows, &self->rows, PyBUF_CONTIG_RO) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    self->tensor_class = (PyTypeObject *)Py_NewRef(tensor_class);
    self->exchange = exchange;
    self->dtype = (DLType){(uint8_t)code, (uint8_t)bits, 1};
    self->num_rows = num_rows, self->width = width, self->out_bytes = width * bits / 8;
    self->row_bytes = blocks ? bytes_in_blocks(width, blocks) : self->out_bytes;
    self->decode = blocks ? blocks->decode : NULL;
    self->fd = fd, self->file_bytes = file_bytes;
    self->slow_ns = slow_ns, self->slow_ns_per_row = slow_ns_per_row;
    if (num_rows < 0 || self->rows.len != num_rows * self->row_bytes) {
        PyErr_Format(PyExc_ValueError, "%zd bytes aren't %lld rows of %lld", self->rows.len, num_rows,
                     (long long)self->row_bytes);
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void lookup_dealloc(Lookup *self) {
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    PyBuffer_Release(&self->rows);
    Py_XDECREF((PyObject *)self->tensor_class);
    PyObject_Free(self);
    Py_DECREF(type);
}

static PyObject *lookup_counts(Lookup *self, PyObject *ignored) {
    (void)ignored;
    PyObject *waits = PyTuple_New(WAIT_BUCKETS);
    for (int k = 0; waits && k < WAIT_BUCKETS; k++) {
        PyObject *count = PyLong_FromLongLong(self->waits[k]);
        if (!count || PyTuple_SetItem(waits, k, count)) Py_CLEAR(waits);
    }
    return waits ? Py_BuildValue("LLLNL", self->calls, self->rows_read, self->asked, waits, self->waited_ns) : NULL;
}

static PyMethodDef lookup_methods[] = {
    {"counts", (PyCFunction)(void (*)(void))lookup_counts, METH_NOARGS, NULL},
    {"read", (PyCFunction)(void (*)(void))lookup_read, METH_O, NULL},
    {"gather", (PyCFunction)(void (*)(void))lookup_gather, METH_FASTCALL, NULL},
    {"looks_cold", (PyCFunction)(void (*)(void))lookup_looks_cold, METH_O, NULL},
    {"prefetch", (PyCFunction)(void (*)(void))lookup_prefetch, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef lookup_members[] = {
    {"batches_to_ask", T_INT, offsetof(Lookup, batches_to_ask), 0, NULL},
    {"batches_after_cold", T_INT, offsetof(Lookup, batches_after_cold), 0, NULL},
    {"slow", T_BOOL, offsetof(Lookup, slow), 0, NULL},
    {"slow_ns", T_LONGLONG, offsetof(Lookup, slow_ns), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot lookup_slots[] = {
    {Py_tp_new, lookup_new}, {Py_tp_dealloc, lookup_dealloc}, {Py_tp_methods, lookup_methods},
    {Py_tp_members, lookup_members}, {0, NULL},
};

static PyType_Spec lookup_spec = {"sense_v2.engram.reading._gather.Lookup", sizeof(Lookup), 0,
                                  Py_TPFLAGS_DEFAULT, lookup_slots};

static PyObject *gather(PyObject *module, PyObject *const *arguments, Py_ssize_t num_arguments) {
    (void)module;
    if (num_arguments != 10) return PyErr_Format(PyExc_TypeError, "gather takes 10 arguments, not %zd", num_arguments);
    Copy copy = {.table = PyLong_AsVoidPtr(arguments[0]), .ids = PyLong_AsVoidPtr(arguments[3]),
                 .row_bytes = PyLong_AsLongLong(arguments[2]), .num_ids = PyLong_AsLongLong(arguments[4]),
                 .id_bytes = (int)PyLong_AsLong(arguments[5])};
    const int64_t num_rows = PyLong_AsLongLong(arguments[1]);
    const long max_threads = PyLong_AsLong(arguments[7]), number = PyLong_AsLong(arguments[9]);
    const int64_t width = PyLong_AsLongLong(arguments[8]);
    const Blocks *blocks;
    if (PyErr_Occurred() || !find_blocks(number, &blocks)) return NULL;
    copy.out_bytes = copy.row_bytes;
    if (blocks) {
        if (copy.row_bytes != bytes_in_blocks(width, blocks))
            return PyErr_Format(PyExc_ValueError, "rows of %lld values don't have %lld bytes", (long long)width,
                                (long long)copy.row_bytes);
        copy.decode = blocks->decode;
        copy.out_bytes = width * (int64_t)sizeof(float);
    }
    Py_buffer out;
    if (PyObject_GetBuffer(arguments[6], &out, PyBUF_CONTIG) < 0) return NULL;
    if (out.len != copy.num_ids * copy.out_bytes) {
        PyErr_Format(PyExc_ValueError, "out has %zd bytes, not %lld rows of %lld", out.len, (long long)copy.num_ids,
                     (long long)copy.out_bytes);
        PyBuffer_Release(&out);
        return NULL;
    }
    int64_t outside;
    Py_BEGIN_ALLOW_THREADS
    outside = first_outside(&copy, num_rows);
    copy.out = out.buf;
    if (outside < 0) copy_all(copy, max_threads);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&out);
    return PyLong_FromLongLong(outside);
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

static PyObject *fix_way(PyObject *module, PyObject *number) {
    (void)module;
    const long way = PyLong_AsLong(number);
    if (PyErr_Occurred()) return NULL;
    if (way < -1 || way >= WAYS) return PyErr_Format(PyExc_ValueError, "there are ways 0 to %d", WAYS - 1);
    while (!take_ways()) Py_BEGIN_ALLOW_THREADS usleep(100); Py_END_ALLOW_THREADS
    ways.fixed = (int)way;
    leave_ways();
    Py_RETURN_NONE;
}

static PyObject *found_ways(PyObject *module, PyObject *ignored) {
    (void)module, (void)ignored;
    PyObject *found = PyList_New(0);
    for (int k = 0; found && k < WIDTHS; k++) {
        const Known known = ways.widths[k];
        if (!known.row_bytes) continue;
        PyObject *times = PyList_New(0);
        for (int way = 0; times && way < ways_of(&known); way++) {
            PyObject *ns = PyFloat_FromDouble(known.num[way] < TIMINGS ? 0 : least_of(known.ns_per_row[way]));
            if (!ns || PyList_Append(times, ns)) Py_CLEAR(times);
            Py_XDECREF(ns);
        }
        PyObject *one = times ? Py_BuildValue("LiiN", (long long)known.row_bytes, known.stream, known.way, times) : NULL;
        if (!one || PyList_Append(found, one)) Py_CLEAR(found);
        Py_XDECREF(one);
    }
    return found;
}

static PyMethodDef methods[] = {
    {"fix_way", (PyCFunction)(void (*)(void))fix_way, METH_O, "See the top of _gather.c."},
    {"found_ways", (PyCFunction)(void (*)(void))found_ways, METH_NOARGS, "See the top of _gather.c."},
    {"gather", (PyCFunction)(void (*)(void))gather, METH_FASTCALL, "Copies rows; see the top of _gather.c."},
    {"will_need", (PyCFunction)(void (*)(void))will_need, METH_FASTCALL, "Reads ahead; see the top of _gather.c."},
    {NULL, NULL, 0, NULL},
};

static int add_lookup(PyObject *module) {
    find_threads();
    PyObject *lookup_type = PyType_FromSpec(&lookup_spec);
    if (!lookup_type || PyModule_AddIntConstant(module, "INTERFACE", INTERFACE)) return -1;
    return PyModule_AddObject(module, "Lookup", lookup_type);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, add_lookup}, {0, NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_gather", NULL, 0, methods, slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__gather(void) { return PyModuleDef_Init(&definition); }
