/* Rows -> their hashes: the compiled form of `row_hashes` in checksums.py.

   hash_rows(row_ids, rows, hashes): U row ids of 8 bytes, U rows one behind the other, room for U hashes of 8 bytes;
   all three are buffers. A hash is xxHash's XXH3, 64 bits, of the row's bytes with the row id as seed, and 0 for a row
   of zeros. third_party/xxhash.h is xxHash 0.8.3, unchanged. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define XXH_INLINE_ALL
#include "xxhash.h"

static int is_zero(const unsigned char *row, size_t row_bytes) {
    return row[0] == 0 && memcmp(row, row + 1, row_bytes - 1) == 0;
}

static PyObject *hash_rows(PyObject *module, PyObject *arguments) {
    (void)module;
    Py_buffer ids, rows, hashes;
    if (!PyArg_ParseTuple(arguments, "y*y*w*", &ids, &rows, &hashes)) return NULL;
    const Py_ssize_t num_rows = ids.len / (Py_ssize_t)sizeof(uint64_t);
    const size_t row_bytes = num_rows ? (size_t)(rows.len / num_rows) : 0;
    const int fits = hashes.len == ids.len && (!num_rows || (row_bytes && rows.len % num_rows == 0));
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        const unsigned char *row = rows.buf;
        for (Py_ssize_t n = 0; n < num_rows; n++, row += row_bytes)
            ((uint64_t *)hashes.buf)[n] =
                is_zero(row, row_bytes) ? 0 : XXH3_64bits_withSeed(row, row_bytes, ((const uint64_t *)ids.buf)[n]);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&ids);
    PyBuffer_Release(&rows);
    PyBuffer_Release(&hashes);
    if (!fits) return PyErr_Format(PyExc_ValueError, "row ids, rows and hashes aren't equally many");
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"hash_rows", hash_rows, METH_VARARGS, "Hashes rows; see the top of _row_hashes.c."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_row_hashes", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__row_hashes(void) { return PyModuleDef_Init(&definition); }
