/* Calls of the system that fail when a test says so: loaded before the C library (LD_PRELOAD).
 *
 * Only files below one folder are meant, so that Python itself goes on. The calls are counted from
 * the time of `faults_arm`, and one of them goes wrong.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum call { READ, WRITE, FLUSH, OPEN, RENAME, REMOVE, MAKE, SIZE, CALLS };

/* What happens instead, besides numbers of errors: these are negative. */
enum { NOTHING = 0, SHORT = -1, DEATH = -2, END = -3, CHANGE = -4 };

/* Instead of the number of a call: every one. */
enum { ALWAYS = -1 };

static char folder[PATH_MAX];
static atomic_int armed_call, armed_fault;
static atomic_long armed_number, counted[CALLS];

void faults_arm(const char *below, int call, long number, int fault)
{
    for (int each = 0; each < CALLS; each++)
        counted[each] = 0;
    armed_call = call;
    armed_number = number;
    armed_fault = fault;
    snprintf(folder, sizeof folder, "%s", below);
}

/* A full disk, for programs that nobody arms: below the folder that the environment names. */
__attribute__((constructor)) static void begin(void)
{
    const char *below = getenv("FAULTS_FULL");
    if (below)
        faults_arm(below, WRITE, ALWAYS, ENOSPC);
}

long faults_counted(int call)
{
    return counted[call];
}

/* Whether an open file is one that is meant. */
static int is_meant(int file)
{
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return strncmp(path, folder, strlen(folder)) == 0;
}

/* The fault that a call meets which is for a file, or for a path from there. */
static int met_at(int call, int file, const char *path)
{
    if (!folder[0])
        return NOTHING;
    if (path && path[0] == '/' ? strncmp(path, folder, strlen(folder)) != 0 : !is_meant(file))
        return NOTHING;
    long number = counted[call]++;
    int is_due = number == armed_number || armed_number == ALWAYS;
    int fault = is_due && call == armed_call ? armed_fault : NOTHING;
    if (fault == DEATH)
        kill(getpid(), SIGKILL);
    if (fault == CHANGE)
        futimens(file, NULL);
    return fault;
}

static int met(int call, int file)
{
    return met_at(call, file, NULL);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* Half of it; whole pages, where a direct write or read asks for that. */
static size_t half(size_t size)
{
    return size > 8192 ? size / 2 / 4096 * 4096 : size;
}

ssize_t pread64(int file, void *memory, size_t size, off64_t start)
{
    int fault = met(READ, file);
    if (fault > 0)
        return errno = fault, -1;
    if (fault == END)
        return 0;
    return REAL(pread64)(file, memory, fault == SHORT ? half(size) : size, start);
}

ssize_t read(int file, void *memory, size_t size)
{
    int fault = met(READ, file);
    if (fault > 0)
        return errno = fault, -1;
    if (fault == END)
        return 0;
    return REAL(read)(file, memory, fault == SHORT && size > 1 ? size / 2 : size);
}

ssize_t pwrite64(int file, const void *memory, size_t size, off64_t start)
{
    int fault = met(WRITE, file);
    if (fault > 0)
        return errno = fault, -1;
    return REAL(pwrite64)(file, memory, fault == SHORT ? half(size) : size, start);
}

ssize_t write(int file, const void *memory, size_t size)
{
    int fault = met(WRITE, file);
    if (fault > 0)
        return errno = fault, -1;
    return REAL(write)(file, memory, fault == SHORT && size > 1 ? size / 2 : size);
}

int fsync(int file)
{
    int fault = met(FLUSH, file);
    return fault > 0 ? (errno = fault, -1) : REAL(fsync)(file);
}

int fdatasync(int file)
{
    int fault = met(FLUSH, file);
    return fault > 0 ? (errno = fault, -1) : REAL(fdatasync)(file);
}

/* Calls that take a path give an error or nothing. */
#define FAIL_AT(call, file, path)                                                                  \
    do {                                                                                           \
        int fault = met_at(call, file, path);                                                      \
        if (fault > 0)                                                                             \
            return errno = fault, -1;                                                              \
    } while (0)

static mode_t mode_of(int flags, va_list rest)
{
    return flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;
}

int openat64(int from, const char *path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    mode_t mode = mode_of(flags, rest);
    va_end(rest);
    FAIL_AT(OPEN, from, path);
    return REAL(openat64)(from, path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    mode_t mode = mode_of(flags, rest);
    va_end(rest);
    FAIL_AT(OPEN, AT_FDCWD, path);
    return REAL(open64)(path, flags, mode);
}

int renameat(int from, const char *old, int to, const char *new)
{
    FAIL_AT(RENAME, to, new);
    return REAL(renameat)(from, old, to, new);
}

int rename(const char *old, const char *new)
{
    FAIL_AT(RENAME, AT_FDCWD, new);
    return REAL(rename)(old, new);
}

int unlinkat(int from, const char *path, int flags)
{
    FAIL_AT(REMOVE, from, path);
    return REAL(unlinkat)(from, path, flags);
}

int unlink(const char *path)
{
    FAIL_AT(REMOVE, AT_FDCWD, path);
    return REAL(unlink)(path);
}

int mkdirat(int from, const char *path, mode_t mode)
{
    FAIL_AT(MAKE, from, path);
    return REAL(mkdirat)(from, path, mode);
}

int mkdir(const char *path, mode_t mode)
{
    FAIL_AT(MAKE, AT_FDCWD, path);
    return REAL(mkdir)(path, mode);
}

int ftruncate64(int file, off64_t size)
{
    FAIL_AT(SIZE, file, NULL);
    return REAL(ftruncate64)(file, size);
}

int fallocate64(int file, int mode, off64_t start, off64_t size)
{
    FAIL_AT(SIZE, file, NULL);
    return REAL(fallocate64)(file, mode, start, size);
}
