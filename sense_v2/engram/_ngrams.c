/* Compressed ids -> row ids: the compiled form of `NgramHasher.look_back` and of the hashes in hashing.py, for tensors
   in this machine's memory. A step of one token is some hundred operators of torch, or two calls of these.

   All arrays are C-contiguous buffers of int64, but `valid`, of bytes that are 0 or 1. Products wrap around, and a
   remainder is never negative, as torch's. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

enum { NO_TOKEN = -1 };

/* An argument that may be None: its buffer, or one of no bytes. */
static int given(PyObject *object, Py_buffer *view, int flags) {
    *view = (Py_buffer){0};
    return object == Py_None ? 0 : PyObject_GetBuffer(object, view, flags);
}

static void release(Py_buffer *views, int count) {
    for (int n = 0; n < count; n++)
        if (views[n].obj) PyBuffer_Release(&views[n]);
}

static int outside(const int64_t *ids, Py_ssize_t count, int64_t low, int64_t high) {
    for (Py_ssize_t n = 0; n < count; n++)
        if (ids[n] < low || ids[n] >= high) return 1;
    return 0;
}

/* The sequences of one batch: T new ids behind P of history. */
struct Sequences {
    const int64_t *ids_BT, *history_BP, *documents_BT;
    const unsigned char *valid_BT;
    Py_ssize_t batch, length, num_history;
    int64_t end_id; /* behind which an n-gram begins anew; negative for none */
};

static int64_t id_at(const struct Sequences *of, Py_ssize_t b, Py_ssize_t place) {
    return place < 0 ? of->history_BP[(b + 1) * of->num_history + place] : of->ids_BT[b * of->length + place];
}

static int is_valid(const struct Sequences *of, Py_ssize_t b, Py_ssize_t place) {
    if (place < 0) return of->history_BP[(b + 1) * of->num_history + place] != NO_TOKEN;
    const Py_ssize_t n = b * of->length + place;
    return (!of->valid_BT || of->valid_BT[n]) && (!of->documents_BT || of->documents_BT[n]);
}

/* Whether an n-gram may go on from `place` to the one after it. History is of the first position's document. */
static int goes_on(const struct Sequences *of, Py_ssize_t b, Py_ssize_t place) {
    if (of->end_id >= 0 && id_at(of, b, place) == of->end_id) return 0;
    if (!of->documents_BT || place < 0) return 1;
    const int64_t *document = of->documents_BT + b * of->length + place;
    return document[0] == document[1];
}

/* look_back(ids [B, T], valid [B, T] or None, documents [B, T] or None, history [B, P] or None, B, num_ids, end_id,
   nothing, found [K, B, T]) -> whether all ids are in their range; else nothing is found. */
static PyObject *look_back(PyObject *module, PyObject *arguments) {
    (void)module;
    PyObject *objects[5];
    Py_ssize_t batch;
    long long num_ids, end_id, nothing;
    if (!PyArg_ParseTuple(arguments, "OOOOnLLLO", &objects[0], &objects[1], &objects[2], &objects[3], &batch, &num_ids,
                          &end_id, &nothing, &objects[4]))
        return NULL;
    Py_buffer views[5] = {{0}};
    for (int n = 0; n < 5; n++) {
        if (given(objects[n], &views[n], n == 4 ? PyBUF_WRITABLE : PyBUF_SIMPLE) < 0) {
            release(views, n);
            return NULL;
        }
    }
    const Py_ssize_t width = sizeof(int64_t), count = views[0].len / width;
    const Py_ssize_t num_history = batch ? views[3].len / width / batch : 0;
    const Py_ssize_t orders = count ? views[4].len / width / count : 0;
    const int fits = (batch ? count % batch == 0 : count == 0) && views[4].len == orders * count * width &&
                     (!views[1].obj || views[1].len == count) && (!views[2].obj || views[2].len == count * width) &&
                     views[3].len == batch * num_history * width;
    int is_inside = 0;
    if (fits) {
        const struct Sequences of = {views[0].buf, views[3].buf, views[2].buf,  views[1].buf,
                                     batch,        batch ? count / batch : 0,   num_history, end_id};
        int64_t *found_KBT = views[4].buf;
        Py_BEGIN_ALLOW_THREADS
        is_inside = !outside(of.ids_BT, count, 0, num_ids) &&
                    !outside(of.history_BP, batch * num_history, NO_TOKEN, num_ids);
        for (Py_ssize_t n = 0; is_inside && n < count; n++) {
            const Py_ssize_t b = n / of.length, t = n % of.length;
            int reaches = is_valid(&of, b, t);
            for (Py_ssize_t back = 0; back < orders; back++) {
                const Py_ssize_t place = t - back;
                if (back) reaches = reaches && place >= -num_history && is_valid(&of, b, place) && goes_on(&of, b, place);
                found_KBT[back * count + n] = reaches ? id_at(&of, b, place) : nothing;
            }
        }
        Py_END_ALLOW_THREADS
    }
    release(views, 5);
    if (!fits) return PyErr_Format(PyExc_ValueError, "the buffers aren't of one batch");
    return PyBool_FromLong(is_inside);
}

static int64_t remainder_of(uint64_t value, int64_t size) {
    const int64_t rest = (int64_t)value % size;
    return rest < 0 ? rest + size : rest;
}

/* hash_rows(ids [K, B, T], multipliers [K, H], is_sum, sizes [H], offsets [H], first_row, found [B, T, H]): the ids
   times a head's multipliers, 0 beyond its order, are added up or combined by exclusive or. */
static PyObject *hash_rows(PyObject *module, PyObject *arguments) {
    (void)module;
    Py_buffer views[5];
    int is_sum;
    long long first_row;
    if (!PyArg_ParseTuple(arguments, "y*y*py*y*Lw*", &views[0], &views[1], &is_sum, &views[2], &views[3], &first_row,
                          &views[4]))
        return NULL;
    const int64_t *ids_KN = views[0].buf, *multipliers_KH = views[1].buf, *sizes_H = views[2].buf;
    const int64_t *offsets_H = views[3].buf;
    int64_t *found_NH = views[4].buf;
    const Py_ssize_t width = sizeof(int64_t), heads = views[2].len / width;
    const Py_ssize_t orders = heads ? views[1].len / width / heads : 0;
    const Py_ssize_t count = heads ? views[4].len / width / heads : 0;
    int fits = heads && views[0].len == orders * count * width && views[1].len == orders * heads * width &&
               views[3].len == views[2].len && views[4].len == count * heads * width;
    for (Py_ssize_t h = 0; fits && h < heads; h++) fits = sizes_H[h] > 0;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t n = 0; n < count; n++) {
            for (Py_ssize_t h = 0; h < heads; h++) {
                uint64_t mix = 0;
                for (Py_ssize_t k = 0; k < orders; k++) {
                    const uint64_t term = (uint64_t)ids_KN[k * count + n] * (uint64_t)multipliers_KH[k * heads + h];
                    mix = is_sum ? mix + term : mix ^ term;
                }
                found_NH[n * heads + h] = remainder_of(mix, sizes_H[h]) + offsets_H[h] + first_row;
            }
        }
        Py_END_ALLOW_THREADS
    }
    release(views, 5);
    if (!fits) return PyErr_Format(PyExc_ValueError, "the buffers aren't of one layer's heads");
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"look_back", look_back, METH_VARARGS, "What n-grams are made of; see _ngrams.c."},
    {"hash_rows", hash_rows, METH_VARARGS, "Their rows; see _ngrams.c."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_ngrams", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__ngrams(void) { return PyModuleDef_Init(&definition); }
