// The kernels of a GPU: one table, as kernels.h has one for each kind of CPU. What they are given lies in
// the device's memory, tables of pointers too. They queue work on a stream, wait for nothing and allocate
// nothing; outputs that counts are added to are zeroed by the caller. Bits are those of the scalar kernels.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace tallcodec {

constexpr uint64_t kGpuUnit = 524288;  // elements whose statistics are summed in one go

// A DecodeBlock of any length, over rows with a scale each where there are row_scales: element `i`'s is
// row_scales[i / row_length].
struct GpuBlock {
  DecodeBlock block;
  const float* row_scales;
  uint64_t row_length;
};

struct GpuTask {
  const void* values;  // n elements
  uint8_t* mask;       // out: (n + 7) / 8 bytes
  float threshold;
  DType dtype;
};

constexpr uint32_t kGpuHeld = 8;  // tasks whose elements an encoding loads once

// An EncodeBlock without the float64 statistics, which `sums` adds up.
struct GpuEncode {
  uint64_t first, n;     // elements first .. n; `first` begins a scale's block
  const void* base;
  DType base_dtype, shared_dtype;
  MaskRule rule;
  bool aligned;          // base, tasks, merged and shared are of one type each and lie at multiples of 16 bytes
  uint32_t tasks;
  GpuTask held[kGpuHeld];  // the first tasks, here
  const GpuTask* task;   // [tasks] all of them, on the device
  const float* merged;   // [n], or null
  void* shared;          // out
  float* shared_scales;  // out, I8 only
  int64_t* set_bits;        // [tasks], added to, as all counts
  int64_t* published_bits;  // [tasks]
  int64_t* agreement;       // [tasks + 1]
  int32_t* nonfinite;       // [tasks + 1] set where a task, or last the base, has a NaN or an infinity
};

// Masks of n elements, of any alignment.
struct GpuMasks {
  uint64_t n;
  uint32_t masks;
  const uint8_t* const* mask;  // [masks]
};

// A coded plane whose bytes end where `size` says; *status is set to 1 where it is not sound. Whatever they
// are, nothing else is read or written.
struct GpuCoded {
  const uint8_t* plane;
  uint64_t size, n;  // bytes, elements
  int32_t* status;
};

struct GpuTernary {
  GpuCoded coded;
  uint64_t head;          // bytes before the plane's blocks
  const uint64_t* slots;  // [1 << kTernarySlotBits] frequency, bias, smallest gap, extra bits: 16, 16, 27, 5 bits
  uint8_t *mask, *signs;  // out: (n + 7) / 8 bytes each, at multiples of 4
};

struct GpuConditional {
  GpuCoded coded;
  const void* shared;
  DType shared_dtype;
  const float* shared_scales;
  uint8_t* mask;  // out
};

// Where to queue. `device` is a number of the runtime's; `stream` a cudaStream_t of it.
struct GpuStream {
  int device;
  void* stream;
};

// Each gives 0 or an error's number, of which `error` has the text.
struct GpuKernels {
  const char* name;
  int (*decode)(GpuStream, const GpuBlock* blocks, uint64_t count);  // blocks in the host's memory
  int (*encode)(GpuStream, const GpuEncode&);
  // [units][3][kLanes]: tau_sq, dot and approx_sq of Sums, of each kGpuUnit elements.
  int (*sums)(GpuStream, const GpuBlock&, const void* task, DType task_dtype, double* sums);
  int (*agreement)(GpuStream, const GpuMasks&, int64_t* counts);        // [masks + 1]
  int (*overlap)(GpuStream, const GpuMasks&, int64_t* pairs);           // [masks * masks], both halves
  int (*consensus)(GpuStream, const GpuMasks&, uint32_t least, uint8_t* out);
  int (*unpack_ternary)(GpuStream, const GpuTernary&);
  int (*unpack_mask)(GpuStream, const GpuConditional&);
  const char* (*error)(int);
  int (*devices)();  // how many there are; less than 0: minus an error's number
};

extern const GpuKernels kernels_cuda;       // where TALLCODEC_HAS_CUDA is defined
extern const GpuKernels kernels_cuda_host;  // the same threads one after the other, on the host's memory

}  // namespace tallcodec
