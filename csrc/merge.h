// Multi-task vectors that are no plain sum, and what is counted of task vectors before they are coded.
#pragma once
#include <cstdint>

#include "dtype.h"
#include "format.h"

namespace tallcodec {

// n elements of a base and of some of its tasks, and how their task vectors are merged.
struct MergeBlock {
  uint64_t n;
  const void* base;
  DType base_dtype;
  uint32_t tasks;
  const void* const* task;  // [tasks]
  const DType* task_dtype;  // [tasks]
  Merge rule;
  uint32_t averaged;  // Average: the number of tasks, those that equal the base included
  const float* cut;   // Ties: [tasks] what is smaller in magnitude is trimmed
  float majority;     // Ties: 1 or -1, the sign elected where the trimmed vectors sum to zero
};

void merge(const MergeBlock& block, float* merged);

// Ties: the elements where the trimmed vectors' sum is positive, less those where it is negative.
int64_t count_signs(const MergeBlock& block);

bool has_nonfinite(const void* array, DType dtype, uint64_t n);

// Counting the bits of magnitudes |tau|: first all of them by their upper half, then those of one
// upper half by their lower one.
constexpr uint32_t kBins = 1 << 16;
constexpr uint32_t kAnyUpper = 0xFFFFFFFF;
void count_magnitudes(const MergeBlock& block, uint32_t task, uint32_t upper, uint64_t* bins);

// Rounds finite values to the type of a shared vector, and back: s as a decoder will see it. An int8
// scale's block begins at the first of them.
void round_to_shared(DType dtype, uint64_t n, float* s);

// Summing by tau / s: what m∘s would be, if its mask m had the elements of a bin. Bins are of float32
// bit patterns, four in an octave around the numbers with two bits of fraction, 2^-20 those of bin 1:
// the ratios that are frequent, as 1 and 1/2, are on no edge. Bin 0 has all that is less; the last has
// no end.
struct RatioBin {
  double dot = 0, approx_sq = 0;  // the sums of tau * s and of s * s
  uint64_t count = 0;
};
constexpr uint32_t kRatioBins = 97;
float least_ratio(uint32_t bin);  // of a bin but the first
void add_ratios(const MergeBlock& block, uint32_t task, const float* s, RatioBin* bins);

// The bin of the element of rank `rank`, from 0, among those counted; rank becomes that within it.
uint32_t find_bin(const uint64_t* bins, uint64_t& rank);

}  // namespace tallcodec
