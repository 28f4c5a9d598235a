// AVX-512 (F, BW, DQ, VL): the vocabulary of kernels_simd.inc in 512-bit registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "float_environment.h"
#include "kernels.h"
#include "mask_math.h"

// Attributes, not a compiler flag of this file's own: what the headers above define inline is
// shared with files that must run on any CPU.
#if defined(__clang__)
#pragma clang attribute push(                                                        \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt"))), \
    apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12, of its own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"        // as above
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt")
#endif

#define INLINE inline __attribute__((always_inline))

namespace tallcodec {
namespace {

constexpr uint64_t kStep = 16, kPair = 2 * kStep;  // elements of a Floats, and of two

using Floats = __m512;
using Mask = __mmask16;
struct Doubles { __m512d lo, hi; };

INLINE Floats splat(float x) { return _mm512_set1_ps(x); }
INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
INLINE Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
INLINE Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
INLINE Floats abs(Floats a) { return _mm512_abs_ps(a); }
INLINE Floats round(Floats a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

INLINE Mask greater(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
INLINE Mask greater_magnitude(Floats a, Floats b) {
  // Of a and b the lesser in magnitude, with the sign of a: differs from a where a is the greater.
  const Floats lesser = _mm512_range_ps(a, b, 2);
  return _mm512_cmp_ps_mask(lesser, a, _CMP_NEQ_OQ);
}
INLINE Mask nonzero(Floats a) { return _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_NEQ_UQ); }
INLINE Mask mask_of(uint16_t bits) { return bits; }
INLINE uint16_t bits_of(Mask m) { return m; }
INLINE Floats select(Mask m, Floats a, Floats b) { return _mm512_mask_mov_ps(b, m, a); }
INLINE Floats where(Mask m, Floats a) { return _mm512_maskz_mov_ps(m, a); }

template <DType T>
INLINE Floats load(const void* p) {
  if constexpr (T == DType::F32) {
    return _mm512_loadu_ps(p);
  } else if constexpr (T == DType::F16) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  } else if constexpr (T == DType::BF16) {
    const __m256i halves = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  } else {
    const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
  }
}

// bfloat16s, in the upper half of each element.
INLINE __m512i bf16_of(Floats v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i below = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_mask_add_epi32(below, odd, bits, _mm512_set1_epi32(0x8000));
  return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
}

INLINE __m256i f16_of(Floats v) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

template <DType T>
INLINE void store(void* p, Floats v) {
  if constexpr (T == DType::F32) {
    _mm512_storeu_ps(p, v);
  } else if constexpr (T == DType::F16) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), f16_of(v));
  } else if constexpr (T == DType::BF16) {
    const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_of(v), 16));
    _mm256_storeu_si256(static_cast<__m256i*>(p), halves);
  } else {
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v));
    _mm_storeu_si128(static_cast<__m128i*>(p), bytes);
  }
}

using Register = __m512i;

template <DType T>
struct Packed { Register part[kPair * size_of(T) / sizeof(Register)]; };

template <DType T>
INLINE Packed<T> pack(Floats a, Floats b) {
  if constexpr (T == DType::F32) {
    return {{_mm512_castps_si512(a), _mm512_castps_si512(b)}};
  } else if constexpr (T == DType::F16) {
    return {{_mm512_inserti64x4(_mm512_castsi256_si512(f16_of(a)), f16_of(b), 1)}};
  } else {
    alignas(64) static constexpr uint16_t upper[] = {
        1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
        33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return {{_mm512_permutex2var_epi16(bf16_of(a), _mm512_load_si512(upper), bf16_of(b))}};
  }
}

INLINE void stream(void* p, Register r) { _mm512_stream_si512(static_cast<__m512i*>(p), r); }

INLINE Doubles load_wide(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
INLINE void store_wide(double* p, Doubles w) {
  _mm512_storeu_pd(p, w.lo);
  _mm512_storeu_pd(p + 8, w.hi);
}
INLINE Doubles widen(Floats v) {
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(v)),
          _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))};
}
INLINE void add_product(Doubles& sum, Doubles a, Doubles b) {
  sum.lo = _mm512_fmadd_pd(a.lo, b.lo, sum.lo);
  sum.hi = _mm512_fmadd_pd(a.hi, b.hi, sum.hi);
}
INLINE void add_product_where(Doubles& sum, Mask m, Doubles a, Doubles b) {
  sum.lo = _mm512_mask3_fmadd_pd(a.lo, b.lo, sum.lo, __mmask8(m));
  sum.hi = _mm512_mask3_fmadd_pd(a.hi, b.hi, sum.hi, __mmask8(m >> 8));
}
INLINE bool all_finite(Doubles w) {
  const __m512d infinity = _mm512_set1_pd(__builtin_inf());
  return (_mm512_cmp_pd_mask(_mm512_abs_pd(w.lo), infinity, _CMP_LT_OQ) &
          _mm512_cmp_pd_mask(_mm512_abs_pd(w.hi), infinity, _CMP_LT_OQ)) == 0xff;
}

struct Stripes {
  __m512i acc;

  explicit Stripes(const uint64_t* start) : acc(_mm512_loadu_si512(start)) {}

  void accumulate(const uint8_t* data, const uint8_t* secret) {
    const __m512i value = _mm512_loadu_si512(data);
    const __m512i key = _mm512_xor_si512(value, _mm512_loadu_si512(secret));
    const __m512i product = _mm512_mul_epu32(key, _mm512_srli_epi64(key, 32));
    const __m512i swapped = _mm512_shuffle_epi32(value, _MM_PERM_BADC);
    acc = _mm512_add_epi64(acc, _mm512_add_epi64(product, swapped));
  }

  void scramble(const uint8_t* secret) {
    acc = _mm512_xor_si512(acc, _mm512_srli_epi64(acc, 47));
    acc = _mm512_xor_si512(acc, _mm512_loadu_si512(secret));
    acc = _mm512_mullo_epi64(acc, _mm512_set1_epi64(0x9e3779b1));
  }

  void finish(uint64_t* to) const { _mm512_storeu_si512(to, acc); }
};

typedef uint64_t Word __attribute__((vector_size(64)));

INLINE void full_add(Word& digit, Word& carry, Word a, Word b) {
  const __m512i x = __m512i(digit), y = __m512i(a), z = __m512i(b);
  carry = Word(_mm512_ternarylogic_epi64(x, y, z, 0xe8));  // the majority
  digit = Word(_mm512_ternarylogic_epi64(x, y, z, 0x96));  // the parity
}

#include "xxh3.inc"

#include "count.inc"

#include "kernels_simd.inc"

template <DType T>
uint64_t unmask_group(MaskGroup& g) {
  static_assert(kMaskStates == kStep);
  const char* const shared = static_cast<const char*>(g.shared);
  const __m512i one = _mm512_set1_epi32(1), all = _mm512_set1_epi32(1 << kMaskBits);
  const __m512i slots = _mm512_set1_epi32((1 << kMaskBits) - 1), least = _mm512_set1_epi32(1 << 16);
  __m512i x = _mm512_loadu_si512(g.state);
  uint64_t found = 0;
  for (uint32_t i = 0; i < kMaskGroup; i += kStep) {
    Floats s = load<T>(shared + i * size_of(T));
    if (T == DType::I8) s = mul(s, splat(g.scale));
    const __m512i bits = _mm512_castps_si512(abs(s));
    const __mmask16 nonzero = _mm512_test_epi32_mask(bits, bits);
    const __m512i context = _mm512_maskz_add_epi32(nonzero, _mm512_srli_epi32(bits, 22), one);
    // Frequencies are of 16 bits, and gathered by 32.
    const __m512i f = _mm512_and_si512(_mm512_i32gather_epi32(context, g.frequency, 2),
                                       _mm512_set1_epi32(0xffff));
    const __m512i slot = _mm512_and_si512(x, slots);
    const __mmask16 is_one = _mm512_cmplt_epu32_mask(slot, f);
    const __m512i width = _mm512_mask_mov_epi32(_mm512_sub_epi32(all, f), is_one, f);
    const __m512i place = _mm512_mask_mov_epi32(_mm512_sub_epi32(slot, f), is_one, slot);
    x = _mm512_add_epi32(_mm512_mullo_epi32(width, _mm512_srli_epi32(x, kMaskBits)), place);
    const __mmask16 low = _mm512_cmplt_epu32_mask(x, least);
    const __m512i words =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(g.word)));
    const __m512i filled = _mm512_or_si512(_mm512_slli_epi32(x, 16), _mm512_maskz_expand_epi32(low, words));
    x = _mm512_mask_mov_epi32(x, low, filled);
    g.word += 2 * __builtin_popcount(low);
    found |= uint64_t{is_one} << i;
  }
  _mm512_storeu_si512(g.state, x);
  return found;
}

uint64_t unmask(MaskGroup& g) {
  switch (g.shared_dtype) {
    case DType::F32: return unmask_group<DType::F32>(g);
    case DType::F16: return unmask_group<DType::F16>(g);
    case DType::BF16: return unmask_group<DType::BF16>(g);
    default: return unmask_group<DType::I8>(g);
  }
}

}  // namespace

const Kernels kernels_avx512 = {"avx512",  encode,    decode,  decode_hashed, sums,  hash,
                                agreement, consensus, overlap, zeros,         unmask};

}  // namespace tallcodec

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
