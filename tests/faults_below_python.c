/* Preloaded: calls that change files of one folder fail, from the n-th on or at it alone.

   fault_arm(folder, n, errno, stays) begins to count, fault_count() says how many there were. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static char folder[4096];
static long at, count;
static int code, stays;

void fault_arm(const char *where, long n, int number, int remains) {
    snprintf(folder, sizeof folder, "%s", where);
    at = n, count = 0, code = number, stays = remains;
}

long fault_count(void) { return count; }

static int fails(void) {
    long now = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    return at > 0 && (stays ? now >= at : now == at);
}

static int fails_at(const char *path) { return folder[0] && !strncmp(path, folder, strlen(folder)) && fails(); }

static int fails_on(int fd) {
    char link[64], path[4096];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails_at(path);
}

#define STAND_IN(type, name, fault, failure, parameters, ...)          \
    type name parameters {                                             \
        static type (*real) parameters;                                \
        if (!real) real = (type (*) parameters)dlsym(RTLD_NEXT, #name); \
        if (fault) {                                                   \
            errno = code;                                              \
            return failure;                                            \
        }                                                              \
        return real(__VA_ARGS__);                                      \
    }

STAND_IN(ssize_t, write, fails_on(fd), -1, (int fd, const void *data, size_t size), fd, data, size)
STAND_IN(ssize_t, pwrite, fails_on(fd), -1, (int fd, const void *data, size_t size, off_t to), fd, data, size, to)
STAND_IN(ssize_t, pwrite64, fails_on(fd), -1, (int fd, const void *data, size_t size, off64_t to), fd, data, size, to)
STAND_IN(int, fsync, fails_on(fd), -1, (int fd), fd)
STAND_IN(int, fdatasync, fails_on(fd), -1, (int fd), fd)
STAND_IN(int, ftruncate, fails_on(fd), -1, (int fd, off_t size), fd, size)
STAND_IN(int, ftruncate64, fails_on(fd), -1, (int fd, off64_t size), fd, size)
STAND_IN(int, posix_fallocate, fails_on(fd), code, (int fd, off_t to, off_t size), fd, to, size)
STAND_IN(int, posix_fallocate64, fails_on(fd), code, (int fd, off64_t to, off64_t size), fd, to, size)
STAND_IN(int, rename, fails_at(new), -1, (const char *old, const char *new), old, new)
STAND_IN(int, unlink, fails_at(path), -1, (const char *path), path)
/* Whose mapping it is can't be seen here. */
STAND_IN(int, msync, folder[0] && fails(), -1, (void *begin, size_t size, int flags), begin, size, flags)
