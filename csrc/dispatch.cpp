// Which kernels this CPU runs: asked once, here and nowhere else.
#include <cstdlib>
#include <cstring>

#include "kernels.h"
#include "tallcodec.h"
#include "text.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace tallcodec {
namespace {

struct Available {
  const Kernels* list[4] = {};  // best first, ended by a null pointer

  Available() {
    const Kernels** next = list;
#if defined(__x86_64__)
    // These include what the operating system saves and restores.
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512) *next++ = &kernels_avx512;
    if (avx2) *next++ = &kernels_avx2;
#endif
    *next++ = &kernels_scalar;
  }

#if defined(__x86_64__)
  static bool has_f16c() {  // a name clang's __builtin_cpu_supports has not always known
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  }
#endif
};

}  // namespace

const Kernels* const* available_kernels() {
  static const Available available;
  return available.list;
}

const Kernels* find_kernels(const char* name) {
  if (!name) name = std::getenv("TALLCODEC_KERNELS");
  const Kernels* const* kernels = available_kernels();
  if (!name || !*name) return *kernels;
  while (*kernels && std::strcmp((*kernels)->name, name) != 0) ++kernels;
  return *kernels;
}

const Kernels& require_kernels() {
  if (const Kernels* kernels = find_kernels()) return *kernels;
  std::string have;
  for (auto k = available_kernels(); *k; ++k) have += text(have.empty() ? "" : ", ", (*k)->name);
  throw Error(Status::Argument, text("TALLCODEC_KERNELS=", std::getenv("TALLCODEC_KERNELS"),
                                     ": this machine has ", have));
}

}  // namespace tallcodec
