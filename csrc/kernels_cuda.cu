// The GPU's kernels in CUDA. Compile with -fmad=false: mask_math.h says why.
#include <cuda_runtime.h>

#include <initializer_list>

#include "gpu.h"
#include "mask_math.h"

#define TALLCODEC_GPU __device__ __forceinline__
#define TALLCODEC_UNROLL _Pragma("unroll")
#define TALLCODEC_UNROLL_BY_4 _Pragma("unroll 4")

namespace tallcodec {
namespace {

TALLCODEC_GPU uint32_t bits_in(uint32_t word) { return uint32_t(__popc(int(word))); }
TALLCODEC_GPU uint32_t equal_bytes(uint32_t a, uint32_t b) { return bits_in(__vcmpeq4(a, b)) / 8; }

class Warp {
 public:
  template <class T>
  using Array = T[1];

  __device__ Warp(uint64_t index, uint32_t* counters) : index(index), counters_(counters) {}

  const uint64_t index;

  template <class Body>
  TALLCODEC_GPU void each(Body body) const { body(threadIdx.x % 32, 0); }
  TALLCODEC_GPU void max16(float* x) const {
    TALLCODEC_UNROLL
    for (uint32_t distance = 8; distance; distance /= 2) {
      const float other = __shfl_xor_sync(kAll, *x, distance);
      *x = other > *x ? other : *x;
    }
  }
  TALLCODEC_GPU uint32_t ballot(const uint32_t* x) const { return __ballot_sync(kAll, *x != 0); }
  TALLCODEC_GPU uint32_t first(const uint32_t* x) const { return __shfl_sync(kAll, *x, 0); }
  TALLCODEC_GPU void count(uint32_t counter, const uint32_t* x) {
    const uint32_t sum = __reduce_add_sync(kAll, *x);
    if (threadIdx.x % 32 == 0 && sum) atomicAdd(counters_ + counter, sum);
  }

 private:
  static constexpr uint32_t kAll = 0xffffffff;
  uint32_t* const counters_;  // of the block, in shared memory
};

#include "gpu_decode.inc"
#include "gpu_encode.inc"
#include "gpu_masks.inc"
#include "gpu_unpack.inc"

template <class Program>
__global__ void __launch_bounds__(Program::kWarps* kWarp) run(const __grid_constant__ Program program) {
  extern __shared__ uint32_t counters[];
  if constexpr (Program::kCounts) {
    for (uint32_t i = threadIdx.x; i < program.counters(); i += blockDim.x) counters[i] = 0;
    __syncthreads();
  }
  Warp warp(uint64_t{blockIdx.x} * Program::kWarps + threadIdx.x / kWarp, counters);
  program(warp);
  if constexpr (Program::kCounts) {
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < program.counters(); i += blockDim.x) {
      if (!counters[i]) continue;
      atomicAdd(reinterpret_cast<unsigned long long*>(program.counter(i)), uint64_t{counters[i]});
    }
  }
}

// Makes a device the current one, for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    error = cudaGetDevice(&found_);
    changed_ = !error && found_ != device;
    if (changed_) error = cudaSetDevice(device);
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(found_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaError_t error;

 private:
  int found_ = 0;
  bool changed_ = false;
};

// cudaErrorInvalidResourceHandle where a stream is not the device's.
cudaError_t check(GpuStream to) {
#if CUDART_VERSION >= 12080
  int device;
  if (to.stream && !cudaStreamGetDevice(cudaStream_t(to.stream), &device) && device != to.device) {
    return cudaErrorInvalidResourceHandle;
  }
#endif
  return cudaSuccess;
}

template <class Program>
int launch(GpuStream to, const Program& program, uint64_t warps) {
  const OnDevice on(to.device);
  if (on.error) return on.error;
  if (const cudaError_t error = check(to)) return error;
  const uint64_t blocks = blocks_of(warps, Program::kWarps);
  cudaLaunchConfig_t config{};
  if constexpr (Program::kCounts) config.dynamicSmemBytes = 4 * size_t{program.counters()};
  if (blocks > 0x7fffffff || config.dynamicSmemBytes > 48 << 10) return cudaErrorInvalidValue;
  config.gridDim = dim3(uint32_t(blocks));
  config.blockDim = dim3(Program::kWarps * kWarp);
  config.stream = cudaStream_t(to.stream);
  return cudaLaunchKernelEx(&config, run<Program>, program);
}

int clear(GpuStream to, void* memory, uint64_t bytes) {
  const OnDevice on(to.device);
  return on.error ? on.error : cudaMemsetAsync(memory, 0, bytes, cudaStream_t(to.stream));
}

#include "gpu_launch.inc"

const char* error(int number) {
  if (number == cudaErrorInsufficientDriver) return "there is no NVIDIA driver, or one that is too old";
  return cudaGetErrorString(cudaError_t(number));
}

int devices() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  return error ? -int(error) : count;
}

}  // namespace

const GpuKernels kernels_cuda = {"cuda",  decode,    encode,         sums,        agreement,
                                 overlap, consensus, unpack_ternary, unpack_mask, error, devices};

}  // namespace tallcodec
