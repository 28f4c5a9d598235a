// Element types, as numbered in the file format (docs/format.md, "Element types").
#pragma once
#include <cstdint>

// The one place that says on what machines this works. Everything includes this file.
#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "tallcodec needs a little-endian machine: a file's numbers are used where they lie, and are little endian"
#endif
#if UINTPTR_MAX < 0xFFFFFFFFFFFFFFFF
#error "tallcodec needs a 64-bit machine: files and tensors of more than 4 GiB are mapped and addressed whole"
#endif

namespace tallcodec {

enum class DType : uint8_t {
  F32 = 1, F16 = 2, BF16 = 3,  // the types the codec computes on
  I8 = 16, U8, I16, U16, I32, U32, I64, U64, BOOL,
  F64 = 32, F8_E4M3, F8_E5M2, F8_E4M3FNUZ, F8_E5M2FNUZ, F8_E8M0, C64,
};

constexpr bool is_arithmetic(DType t) { return t >= DType::F32 && t <= DType::BF16; }

// Bytes per element; 0 for a number that is no element type.
constexpr uint32_t size_of(DType t) {
  switch (t) {
    case DType::F64: case DType::I64: case DType::U64: case DType::C64: return 8;
    case DType::F32: case DType::I32: case DType::U32: return 4;
    case DType::F16: case DType::BF16: case DType::I16: case DType::U16: return 2;
    case DType::I8: case DType::U8: case DType::BOOL:
    case DType::F8_E4M3: case DType::F8_E5M2: case DType::F8_E4M3FNUZ:
    case DType::F8_E5M2FNUZ: case DType::F8_E8M0: return 1;
  }
  return 0;
}

}  // namespace tallcodec
