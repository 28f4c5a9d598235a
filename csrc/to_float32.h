// Arrays of the arithmetic types as float32.
#pragma once
#include <cstdint>
#include <cstring>

#include "dtype.h"
#include "mask_math.h"

namespace tallcodec {

template <typename T, typename Convert>
void to_float32(const uint8_t* array, uint64_t n, float* to, Convert convert) {
  for (uint64_t i = 0; i < n; ++i) {
    T value;
    std::memcpy(&value, array + i * sizeof value, sizeof value);
    to[i] = convert(value);
  }
}

// n elements of `array`, whose type is F32, F16 or BF16.
inline void to_float32(const uint8_t* array, DType dtype, uint64_t n, float* to) {
  switch (dtype) {
    case DType::F32: std::memcpy(to, array, n * sizeof *to); return;
    case DType::F16: return to_float32<uint16_t>(array, n, to, f16_to_f32);
    default: return to_float32<uint16_t>(array, n, to, bf16_to_f32);
  }
}

}  // namespace tallcodec
