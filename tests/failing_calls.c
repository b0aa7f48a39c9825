/* Preloaded into a process, lets the n-th call that writes below a folder fail, whoever makes it: Python, Arrow, Rust.

   arm(folder, n, error, stays) counts opens for writing, writes, fsyncs, renames and mkdirs; the n-th fails with the
   error number, and with `stays` every later one but fsync and rename does too, as on a disk that is full. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[4096];
static size_t length;
static atomic_long calls, failing;
static int number, lasting;

void arm(const char *below, long n, int error, int stays) {
  length = 0;
  strncpy(folder, below, sizeof folder - 1);
  atomic_store(&calls, 0);
  atomic_store(&failing, n);
  number = error;
  lasting = stays;
  length = strlen(folder);
}

long counted(void) { return atomic_load(&calls); }

static int fails(int takes_space) {
  long call = atomic_fetch_add(&calls, 1) + 1, at = atomic_load(&failing);
  if (at > 0 && (call == at || (lasting && takes_space && call > at))) {
    errno = number;
    return 1;
  }
  return 0;
}

static int is_below(const char *path) { return length && path && strncmp(path, folder, length) == 0; }

static int is_in(int descriptor) {
  char link[64], path[4096];
  if (!length) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n <= 0) return 0;
  path[n] = 0;
  return is_below(path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define OPEN(name)                                                                 \
  int name(const char *path, int flags, ...) {                                     \
    va_list rest;                                                                  \
    va_start(rest, flags);                                                         \
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;      \
    va_end(rest);                                                                  \
    if ((flags & (O_WRONLY | O_RDWR)) && is_below(path) && fails(1)) return -1;    \
    return REAL(name)(path, flags, mode);                                          \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                               \
  int name(int at, const char *path, int flags, ...) {                             \
    va_list rest;                                                                  \
    va_start(rest, flags);                                                         \
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;      \
    va_end(rest);                                                                  \
    if ((flags & (O_WRONLY | O_RDWR)) && is_below(path) && fails(1)) return -1;    \
    return REAL(name)(at, path, flags, mode);                                      \
  }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int descriptor, const void *bytes, size_t count) {
  if (is_in(descriptor) && fails(1)) return -1;
  return REAL(write)(descriptor, bytes, count);
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
  if (is_in(descriptor) && fails(1)) return -1;
  return REAL(writev)(descriptor, parts, count);
}

int fsync(int descriptor) {
  if (is_in(descriptor) && fails(0)) return -1;
  return REAL(fsync)(descriptor);
}

int rename(const char *from, const char *to) {
  if (is_below(to) && fails(0)) return -1;
  return REAL(rename)(from, to);
}

int mkdir(const char *path, mode_t mode) {
  if (is_below(path) && fails(1)) return -1;
  return REAL(mkdir)(path, mode);
}
