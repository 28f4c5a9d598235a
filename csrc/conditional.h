// Masks coded given the shared vector, in blocks that decode alone. docs/format.md, "Conditional masks".
#pragma once
#include <cstdint>
#include <string>

#include "kernels.h"

namespace tallcodec {

// A stretch of a shared vector as it is stored. The scales are those of int8.
struct SharedBlock {
  const void* values;
  DType dtype;
  const float* scales;
};

// The coded bits of n elements, at most a block's; "" where none is set. None is where s is 0.
std::string code_mask(const uint8_t* mask, const SharedBlock& s, uint64_t n);

// The (n + 7) / 8 bytes of a mask from a coded block. Believes nothing: what is not sound is an
// Error(Status::Format).
void decode_mask(const uint8_t* bytes, uint64_t size, const SharedBlock& s, uint64_t n,
                 const Kernels& kernels, uint8_t* mask);

}  // namespace tallcodec
