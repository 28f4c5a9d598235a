// The kernels: one table of function pointers per instruction set. Kernels see arrays, never files,
// never allocate, never fail, and every variant gives the same bits as the scalar one.
#pragma once
#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace tallcodec {

constexpr uint32_t kScaleBlock = 128;  // elements per scale of an int8 shared vector
constexpr uint32_t kLanes = 16;        // float64 partial sums per statistic

// Running sums of one task over a range of elements, in float64. Element i of the range adds to
// lane i % kLanes. tau = task - base; approx = m*s, the decoded task vector at scale 1: where the
// mask bit is 0 nothing is added, be tau infinite or NaN. All products are exact (two float32
// factors), so a fused multiply-add gives the same bits.
struct Sums {
  double tau_sq[kLanes];     // sum of tau * tau
  double dot[kLanes];        // sum of tau * approx
  double approx_sq[kLanes];  // sum of approx * approx
};

struct TaskStats {
  Sums sums;
  uint64_t set_bits;        // mask bits stored as 1
  uint64_t published_bits;  // bits the rule sets, those where s = 0 included
  bool nonfinite;           // the task has a NaN or an infinity (never cleared by a kernel)
};

// Which elements of a task are active; mask_math.h has the formulas.
enum class MaskRule : uint8_t { Published, Magnitude, Adapted };

// One pass over n elements of a base and of all its tasks: the shared vector, the masks, the
// statistics. Everything accumulates: the caller zeroes it before the first call of a range, and
// every call but a range's last has n a multiple of kScaleBlock.
struct EncodeBlock {
  uint64_t n;
  uint32_t tasks;
  const void* base;
  DType base_dtype;
  const void* const* task;  // [tasks]
  const DType* task_dtype;  // [tasks]
  MaskRule rule;
  const float* threshold;   // [tasks] of the rule: lambda, 0 or more; a magnitude; or a factor of s
  const float* merged;      // [n] the multi-task vector; null: the sum of the task vectors
  void* shared;             // out: n elements of shared_dtype (I8: quantised)
  DType shared_dtype;       // F32, BF16, F16 or I8
  float* shared_scales;     // out, I8 only: one per kScaleBlock elements
  uint8_t* const* mask;     // out: [tasks] planes of (n + 7) / 8 bytes, spare bits 0
  TaskStats* stats;         // [tasks]
  uint64_t* agreement;      // [tasks + 1] elements on which the rule sets exactly k bits
  bool base_nonfinite;      // set where the base has a NaN or an infinity
};

// In place of a shared vector's type: s is 1 or, where a bit is set, -1, the bits being laid out as a
// mask's. With a mask and a scale they are a ternary plane.
constexpr DType kSigns = DType::BOOL;

// Elements first .. first + n of a tensor. base, shared, task and out point at element `first`;
// mask, shared_scales and shared where it is signs at the element first - phase, where phase =
// first % kScaleBlock.
struct DecodeBlock {
  uint64_t n;
  uint32_t phase;
  const void* base;
  DType base_dtype;
  const void* shared;
  DType shared_dtype;  // or kSigns
  const float* shared_scales;
  const uint8_t* mask;  // null: no bit is set, the base is only converted
  float scale;          // g; 1 gives the published decode exactly
  void* out;
  DType out_dtype;
};

// Masks of several tasks over the same n elements; spare bits of their last bytes do not count.
struct MaskBlock {
  uint64_t n;
  uint32_t masks;
  const uint8_t* const* mask;  // [masks] planes of (n + 7) / 8 bytes
};

// What the coders of planes share (rans.h): a state between symbols is this or more.
constexpr uint32_t kLeast = 1 << 16;

// The coding of ternary planes (ternary.h).
constexpr uint64_t kTernaryBlock = 262144;  // elements
constexpr uint32_t kTernarySlotBits = 11;   // of a frequency

// The coding of masks given the shared vector (conditional.h).
constexpr uint64_t kMaskBlock = 524288;  // elements
constexpr uint32_t kMaskBits = 12;      // a one's frequency and a zero's add up to 2^12
constexpr uint32_t kMaskStates = 16;    // elements take turns on them
constexpr uint32_t kMaskGroup = 64;     // elements
// 0 where s is 0, else 1 + exponent and leading fraction bit of s; a NaN, which no writer stores, has
// the one behind these.
constexpr uint32_t kMaskContexts = 512;

// A group of a coded mask, of one scale of an int8 shared vector.
struct MaskGroup {
  const void* shared;  // kMaskGroup elements
  DType shared_dtype;
  float scale;                // I8 only
  const uint16_t* frequency;  // [kMaskContexts + 2] of a one, by context; the last is not used
  uint32_t* state;            // [kMaskStates], each of 65,536 or more; left as the next group finds it
  const uint8_t* word;        // where kMaskGroup + 16 of the words can be read; moved behind those used
};

constexpr uint64_t kSumBlock = 65536;  // bytes per checksum

struct Kernels {
  const char* name;
  void (*encode)(EncodeBlock&);
  void (*decode)(const DecodeBlock&);
  // The same of whole checksum blocks of base and shared vector, from phase 0, and the hashes of these, one behind the
  // other; `shared` is null, or not used, where there is no shared vector.
  void (*decode_hashed)(const DecodeBlock&, uint64_t* base, uint64_t* shared);
  // Adds the sums of one task over a range that begins at lane 0, from stored masks: for scales per
  // row. Uses n, phase, base, shared, shared_scales and mask of the block; ignores out and scale.
  void (*sums)(const DecodeBlock&, const void* task, DType task_dtype, Sums&);
  // XXH3-64 (seed 0, default secret) of `size` bytes, a multiple of 64, extended by zero bytes to
  // 256 where shorter.
  uint64_t (*hash)(const void* data, size_t size);
  // Adds to counts[k], k = 0 .. masks, the elements on which exactly k masks are set.
  void (*agreement)(const MaskBlock&, uint64_t* counts);
  // The mask of the elements on which `least` masks or more are set; `least` is not 0.
  void (*consensus)(const MaskBlock&, uint32_t least, uint8_t* out);
  // Adds to pairs[x * masks + y], x <= y, the elements on which both masks are set.
  void (*overlap)(const MaskBlock&, uint64_t* pairs);
  // How many of n elements of a shared vector are 0; the first one begins a scale's block.
  uint64_t (*zeros)(const void* shared, DType, const float* scales, uint64_t n);
  // The mask's bits of a group. Under the caller's FloatEnvironment.
  uint64_t (*unmask)(MaskGroup&);
};

extern const Kernels kernels_scalar, kernels_avx2, kernels_avx512;

// The best table this CPU runs, or the one TALLCODEC_KERNELS (or a non-null `name`) forces.
// Null when the forced one is unknown or the CPU cannot run it.
const Kernels* find_kernels(const char* name = nullptr);

// The same, but for an Error(Status::Argument) where find_kernels() has none.
const Kernels& require_kernels();

// The tables this CPU runs, best first, ended by a null pointer.
const Kernels* const* available_kernels();

}  // namespace tallcodec
