/* Memory for results, used again when its tensor is gone, and how it becomes a tensor.

   PyTorch calls `give_back` when nothing refers to a tensor's storage any more: no view, no array made from it, no
   operation that saved it for its backward. Until then the memory is nobody else's. Fresh memory costs more than the
   copies that go into it (page faults), so up to KEPT pieces of each size wait to be used again, the last one first:
   it may still be in the cache. They are the whole process's, and as many as were in use at once at some time.

   A tensor is made through DLPack's table of C functions (DLPack 1.3, `torch.Tensor.__dlpack_c_exchange_api__`), whose
   layout is a public contract: no header and no library of PyTorch's is needed, and no version of it is meant. */

#ifndef SENSE_RESULTS_H
#define SENSE_RESULTS_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

/* DLPack */

enum { DL_MAJOR = 1, DL_CPU = 1 };
typedef struct { uint32_t major, minor; } DLVersion;
typedef struct { int32_t type, number; } DLDevice;
typedef struct { uint8_t code, bits; uint16_t lanes; } DLType;
typedef struct {
    void *data;
    DLDevice device;
    int32_t ndim;
    DLType dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} DLTensor;
typedef struct DLManaged {
    DLVersion version;
    void *context;
    void (*deleter)(struct DLManaged *);
    uint64_t flags;
    DLTensor tensor;
} DLManaged;
typedef struct DLExchange {
    DLVersion version;
    struct DLExchange *older;
    void *allocate, *from_object;
    int (*to_object)(DLManaged *, void **);  /* takes what it is given */
    int (*view)(void *, DLTensor *);         /* valid while the caller holds the object and doesn't run its code */
    void *stream;
} DLExchange;

/* Results */

enum {
    DIMS_MAX = 16,
    SMALLEST = 12, SIZES = 48,      /* powers of two of bytes */
    HUGE_BYTES = 2 << 20,
    KEPT = 4,
};
static const size_t KEPT_BYTES = (size_t)256 << 20;  /* of all sizes; a single larger result is kept alone */

typedef struct Result {
    DLManaged managed;
    int64_t shape[DIMS_MAX], strides[DIMS_MAX];
    struct Result *next;
    char *memory;
    int size;
} Result;

static struct {
    char taken;  /* by a thread. Who can't have it does without: a fork may leave it taken for ever */
    Result *first[SIZES];
    int count[SIZES];
    size_t bytes;
} kept;

static void free_result(Result *result) {
    free(result->memory);
    free(result);
}

static void free_kept(void) {
    for (int size = 0; size < SIZES; size++) {
        while (kept.first[size]) {
            Result *result = kept.first[size];
            kept.first[size] = result->next;
            free_result(result);
        }
        kept.count[size] = 0;
    }
    kept.bytes = 0;
}

static Result *new_result(int size) {
    const size_t num_bytes = (size_t)1 << (SMALLEST + size);
    Result *result = calloc(1, sizeof *result);
    void *memory = NULL;
    if (!result || posix_memalign(&memory, num_bytes >= 2 * HUGE_BYTES ? HUGE_BYTES : 64, num_bytes)) {
        free(result);
        return NULL;
    }
#if defined(MADV_HUGEPAGE)
    if (num_bytes >= 2 * HUGE_BYTES) madvise(memory, num_bytes, MADV_HUGEPAGE);
#endif
    result->memory = memory;
    result->size = size;
    return result;
}

/* Of unknown content, at a cache line; NULL where there is no memory. */
static Result *take_result(size_t num_bytes) {
    int size = 0;
    while (size < SIZES && (size_t)1 << (SMALLEST + size) < num_bytes) size++;
    if (size == SIZES) return NULL;
    Result *result = NULL;
    if (!__atomic_test_and_set(&kept.taken, __ATOMIC_ACQUIRE)) {
        result = kept.first[size];
        if (result) {
            kept.first[size] = result->next;
            kept.count[size]--;
            kept.bytes -= (size_t)1 << (SMALLEST + size);
        }
        __atomic_clear(&kept.taken, __ATOMIC_RELEASE);
    }
    return result ? result : new_result(size);
}

static void give_back(Result *result) {
    const int size = result->size;
    const size_t num_bytes = (size_t)1 << (SMALLEST + size);
    int keep = 0;
    if (!__atomic_test_and_set(&kept.taken, __ATOMIC_ACQUIRE)) {
        keep = kept.count[size] < KEPT;
        if (keep) {
            if (kept.bytes + num_bytes > KEPT_BYTES) free_kept();
            result->next = kept.first[size];
            kept.first[size] = result;
            kept.count[size]++;
            kept.bytes += num_bytes;
        }
        __atomic_clear(&kept.taken, __ATOMIC_RELEASE);
    }
    if (!keep) free_result(result);
}

static void tensor_is_gone(DLManaged *managed) { give_back((Result *)managed); }

/* As [ids' shape..., width]. */
static void shape_result(Result *result, const DLTensor *ids, int64_t width, DLType dtype) {
    for (int dim = 0; dim < ids->ndim; dim++) result->shape[dim] = ids->shape[dim];
    result->shape[ids->ndim] = width;
    int64_t stride = 1;
    for (int dim = ids->ndim; dim >= 0; dim--) {
        result->strides[dim] = stride;
        stride *= result->shape[dim] ? result->shape[dim] : 1;
    }
    result->managed = (DLManaged){
        .version = {DL_MAJOR, 0},
        .deleter = tensor_is_gone,
        .tensor = {.data = result->memory, .device = {DL_CPU, 0}, .ndim = ids->ndim + 1, .dtype = dtype,
                   .shape = result->shape, .strides = result->strides},
    };
}

#endif
