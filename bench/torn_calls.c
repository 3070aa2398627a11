/* Counts the system calls that change files under one directory, and dies at a chosen one.
 *
 * Preloaded (LD_PRELOAD); does nothing until arm() is called. Calls of all threads are counted together.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BEFORE, AFTER, HALF };

static char root[PATH_MAX];
static size_t root_length;
static long fatal;
static int how;
static long calls;

void arm(const char *directory, long at, int when) {
    strncpy(root, directory, sizeof root - 1);
    calls = 0;
    fatal = at;
    how = when;
    root_length = strlen(root);
}

long counted(void) { return calls; }

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static int under(const char *path) { return root_length && strncmp(path, root, root_length) == 0; }

static int fd_under(int fd) {
    char link[64], path[PATH_MAX];
    if (!root_length) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return under(path);
}

static int at_under(int fd, const char *path) {
    return path[0] == '/' || fd == AT_FDCWD ? under(path) : fd_under(fd);
}

/* Whether this call is the fatal one; dies at once if it is to die before it. */
static int fatal_now(int mine) {
    if (!mine || __sync_add_and_fetch(&calls, 1) != fatal) return 0;
    if (how == BEFORE) die();
    return 1;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CALL(mine, expression)                \
    int now = fatal_now(mine);                \
    __typeof__(expression) result = expression; \
    if (now) die();                           \
    return result;

#define WRITES (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC)
#define OPEN(name)                                             \
    int name(const char *path, int flags, ...) {               \
        va_list rest;                                          \
        va_start(rest, flags);                                 \
        mode_t mode = va_arg(rest, mode_t);                    \
        va_end(rest);                                          \
        CALL((flags & WRITES) && under(path), NEXT(name)(path, flags, mode)) \
    }
#define OPENAT(name)                                           \
    int name(int fd, const char *path, int flags, ...) {       \
        va_list rest;                                          \
        va_start(rest, flags);                                 \
        mode_t mode = va_arg(rest, mode_t);                    \
        va_end(rest);                                          \
        CALL((flags & WRITES) && at_under(fd, path), NEXT(name)(fd, path, flags, mode)) \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *buffer, size_t size) {
    int now = fatal_now(fd_under(fd));
    if (now && how == HALF) {
        size /= 2;
        if (fcntl(fd, F_GETFL) & O_DIRECT) size &= ~4095UL; /* what the system takes past its cache */
    }
    ssize_t result = NEXT(write)(fd, buffer, size);
    if (now) die();
    return result;
}

int fsync(int fd) { CALL(fd_under(fd), NEXT(fsync)(fd)) }
int fdatasync(int fd) { CALL(fd_under(fd), NEXT(fdatasync)(fd)) }
int ftruncate(int fd, off_t size) { CALL(fd_under(fd), NEXT(ftruncate)(fd, size)) }
int ftruncate64(int fd, off64_t size) { CALL(fd_under(fd), NEXT(ftruncate64)(fd, size)) }
int rename(const char *from, const char *to) { CALL(under(from) || under(to), NEXT(rename)(from, to)) }
int renameat(int a, const char *from, int b, const char *to) {
    CALL(at_under(a, from) || at_under(b, to), NEXT(renameat)(a, from, b, to))
}
int link(const char *from, const char *to) { CALL(under(to), NEXT(link)(from, to)) }
int symlink(const char *from, const char *to) { CALL(under(to), NEXT(symlink)(from, to)) }
int symlinkat(const char *from, int fd, const char *to) { CALL(at_under(fd, to), NEXT(symlinkat)(from, fd, to)) }
int mkdir(const char *path, mode_t mode) { CALL(under(path), NEXT(mkdir)(path, mode)) }
int mkdirat(int fd, const char *path, mode_t mode) { CALL(at_under(fd, path), NEXT(mkdirat)(fd, path, mode)) }
int unlink(const char *path) { CALL(under(path), NEXT(unlink)(path)) }
int unlinkat(int fd, const char *path, int flags) { CALL(at_under(fd, path), NEXT(unlinkat)(fd, path, flags)) }
int rmdir(const char *path) { CALL(under(path), NEXT(rmdir)(path)) }
