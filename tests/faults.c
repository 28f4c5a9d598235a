// Preloaded into a process (tests/faults.py): the n-th call from now on that changes a file, or makes sure of it,
// ends the process, or fails.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

enum Fault { KILL_IN = 0, KILL_AFTER, NO_SPACE, NO_SPACE_EVER, IO_ERROR, SHORT, INTERRUPTED };

static int left = -1, fault, calls, failing;

void faults_arm(int after, int kind) {
  left = after;
  fault = kind;
  calls = failing = 0;
}

int faults_calls(void) { return calls; }

// Whether the call that is beginning is the one.
static int is_due(void) {
  ++calls;
  return left >= 0 && left-- == 0;
}

static void die(void) {
  kill(getpid(), SIGKILL);
  pause();
}

static int fail(int error) {
  errno = error;
  return -1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

// A call that is done or not.
#define WHOLE(name, parameters, arguments)                                  \
  int name parameters {                                                     \
    if (!is_due()) return REAL(name) arguments;                             \
    if (fault == KILL_IN) die();                                            \
    if (fault == IO_ERROR) return fail(EIO);                                \
    if (fault == NO_SPACE || fault == NO_SPACE_EVER) return fail(ENOSPC);   \
    int result = REAL(name) arguments;                                      \
    if (fault == KILL_AFTER) die();                                         \
    return result;                                                          \
  }

WHOLE(fsync, (int fd), (fd))
WHOLE(ftruncate, (int fd, off_t size), (fd, size))
WHOLE(ftruncate64, (int fd, off64_t size), (fd, size))
WHOLE(rename, (const char* from, const char* to), (from, to))
WHOLE(link, (const char* from, const char* to), (from, to))
WHOLE(unlink, (const char* path), (path))

// A write, of which a part may be done. A full disk takes a part first.
#define PART(name, parameters, whole, part, fd)                             \
  ssize_t name parameters {                                                 \
    struct stat found;                                                      \
    if (fstat(fd, &found) != 0 || !S_ISREG(found.st_mode)) return REAL(name) whole; \
    if (failing) {                                                          \
      failing = fault == NO_SPACE_EVER;                                     \
      return fail(ENOSPC);                                                  \
    }                                                                       \
    if (!is_due()) return REAL(name) whole;                                 \
    if (fault == IO_ERROR) return fail(EIO);                                \
    if (fault == INTERRUPTED) return fail(EINTR);                           \
    if (fault == KILL_AFTER) {                                              \
      REAL(name) whole;                                                     \
      die();                                                                \
    }                                                                       \
    ssize_t done = size > 1 ? REAL(name) part : 0;                          \
    if (fault == KILL_IN) die();                                            \
    if (fault == SHORT) return size > 1 ? done : REAL(name) whole;          \
    failing = fault == NO_SPACE_EVER || done > 0;                           \
    return done > 0 ? done : fail(ENOSPC);                                  \
  }

PART(write, (int fd, const void* data, size_t size), (fd, data, size), (fd, data, size / 2), fd)
PART(pwrite, (int fd, const void* data, size_t size, off_t at), (fd, data, size, at), (fd, data, size / 2, at), fd)
PART(pwrite64, (int fd, const void* data, size_t size, off64_t at), (fd, data, size, at), (fd, data, size / 2, at), fd)
