// The least a test program needs: check(), CHECK(), and the counts for a closing line.
#pragma once
#include <cstdarg>
#include <cstdio>

static int passed = 0, failed = 0;

__attribute__((format(printf, 2, 3))) static inline void check(bool ok, const char* format, ...) {
  ok ? ++passed : ++failed;
  if (ok || failed > 20) return;
  va_list arguments;
  va_start(arguments, format);
  std::printf("FAILED: ");
  std::vprintf(format, arguments);
  std::printf("\n");
  va_end(arguments);
}

#define CHECK(condition) check(condition, "%s:%d: %s", __FILE__, __LINE__, #condition)
