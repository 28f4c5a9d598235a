// The GPU's kernels on the host, lane by lane: every warp of a launch, one after the other. For the tests, which
// so run the very code a GPU would, and for who debugs it.
#include <cstring>
#include <initializer_list>
#include <vector>

#include "float_environment.h"
#include "gpu.h"
#include "mask_math.h"

#define TALLCODEC_GPU inline
#define TALLCODEC_UNROLL
#define TALLCODEC_UNROLL_BY_4

namespace tallcodec {
namespace {

uint32_t bits_in(uint32_t word) { return uint32_t(__builtin_popcount(word)); }
uint32_t equal_bytes(uint32_t a, uint32_t b) {
  uint32_t equal = 0;
  for (uint32_t shift = 0; shift < 32; shift += 8) equal += (a >> shift & 0xff) == (b >> shift & 0xff);
  return equal;
}

class Warp {
 public:
  template <class T>
  using Array = T[32];

  Warp(uint64_t index, uint32_t* counters) : index(index), counters_(counters) {}

  const uint64_t index;

  template <class Body>
  void each(Body body) const {
    for (uint32_t lane = 0; lane < 32; ++lane) body(lane, lane);
  }
  void max16(float* x) const {
    for (float* half : {x, x + 16}) {
      float largest = half[0];
      for (uint32_t i = 1; i < 16; ++i) largest = half[i] > largest ? half[i] : largest;
      for (uint32_t i = 0; i < 16; ++i) half[i] = largest;
    }
  }
  uint32_t ballot(const uint32_t* x) const {
    uint32_t bits = 0;
    for (uint32_t lane = 0; lane < 32; ++lane) bits |= uint32_t(x[lane] != 0) << lane;
    return bits;
  }
  uint32_t first(const uint32_t* x) const { return x[0]; }
  void count(uint32_t counter, const uint32_t* x) {
    for (uint32_t lane = 0; lane < 32; ++lane) counters_[counter] += x[lane];
  }

 private:
  uint32_t* const counters_;
};

#include "gpu_decode.inc"
#include "gpu_encode.inc"
#include "gpu_masks.inc"
#include "gpu_unpack.inc"

template <class Program>
uint32_t counters_of(const Program& program) {
  if constexpr (Program::kCounts) return program.counters();
  return 0;
}

template <class Program>
__attribute__((noinline)) void run(const Program& program, uint64_t warps) {
  const uint32_t counters = counters_of(program);
  // Warps of a block that are there for nothing run too, as on a GPU.
  for (uint64_t block = 0; block < blocks_of(warps, Program::kWarps); ++block) {
    std::vector<uint32_t> counted(counters);
    for (uint32_t i = 0; i < Program::kWarps; ++i) {
      Warp warp(block * Program::kWarps + i, counted.data());
      program(warp);
    }
    if constexpr (Program::kCounts) {
      for (uint32_t i = 0; i < counters; ++i) *program.counter(i) += counted[i];
    }
  }
}

template <class Program>
int launch(GpuStream, const Program& program, uint64_t warps) {
  FloatEnvironment environment;
  run(program, warps);
  return 0;
}

int clear(GpuStream, void* memory, uint64_t bytes) {
  std::memset(memory, 0, bytes);
  return 0;
}

#include "gpu_launch.inc"

const char* error(int) { return "no error"; }
int devices() { return 1; }

}  // namespace

const GpuKernels kernels_cuda_host = {"cuda-host", decode,    encode,         sums,        agreement,
                                      overlap,     consensus, unpack_ternary, unpack_mask, error, devices};

}  // namespace tallcodec
