// The least a test program needs: CHECK, and a closing line with the counts.
#pragma once
#include <cstdio>

static int passed_checks = 0, failed_checks = 0;

#define CHECK(condition)                                                          \
  do {                                                                            \
    if (condition) {                                                              \
      ++passed_checks;                                                            \
    } else if (++failed_checks <= 20) {                                           \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
    }                                                                             \
  } while (0)

static int finish_checks() {
  std::printf("%d passed, %d failed\n", passed_checks, failed_checks);
  return failed_checks != 0;
}
