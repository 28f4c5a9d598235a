// AVX2 (with FMA and F16C): the vocabulary of kernels_simd.inc in pairs of 256-bit registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "float_environment.h"
#include "kernels.h"
#include "mask_math.h"

// Attributes, not a compiler flag of this file's own: what the headers above define inline is
// shared with files that must run on any CPU.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt")
#endif

#define INLINE inline __attribute__((always_inline))

namespace tallcodec {
namespace {

constexpr uint64_t kStep = 16, kPair = 2 * kStep;  // elements of a Floats, and of two

struct Floats { __m256 lo, hi; };
struct Mask { __m256 lo, hi; };  // all bits of an element alike
struct Doubles { __m256d part[4]; };

INLINE Floats splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE Floats add(Floats a, Floats b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
INLINE Floats sub(Floats a, Floats b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
INLINE Floats mul(Floats a, Floats b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
INLINE Floats div(Floats a, Floats b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
INLINE Floats min(Floats a, Floats b) {
  return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
INLINE Floats max(Floats a, Floats b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
INLINE Floats abs(Floats a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
INLINE Floats round(Floats a) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, nearest), _mm256_round_ps(a.hi, nearest)};
}

INLINE Mask greater(Floats a, Floats b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ)};
}
INLINE Mask greater_magnitude(Floats a, Floats b) { return greater(abs(a), abs(b)); }
INLINE Mask nonzero(Floats a) {
  const __m256 zero = _mm256_setzero_ps();
  return {_mm256_cmp_ps(a.lo, zero, _CMP_NEQ_UQ), _mm256_cmp_ps(a.hi, zero, _CMP_NEQ_UQ)};
}
INLINE Mask mask_of(uint16_t bits) {
  const __m256i spread = _mm256_set1_epi32(bits);
  const __m256i low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i high = _mm256_slli_epi32(low, 8);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(spread, low), low)),
          _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(spread, high), high))};
}
INLINE uint16_t bits_of(Mask m) {
  return uint16_t(_mm256_movemask_ps(m.lo) | _mm256_movemask_ps(m.hi) << 8);
}
INLINE Floats select(Mask m, Floats a, Floats b) {
  return {_mm256_blendv_ps(b.lo, a.lo, m.lo), _mm256_blendv_ps(b.hi, a.hi, m.hi)};
}
INLINE Floats where(Mask m, Floats a) {
  return {_mm256_and_ps(a.lo, m.lo), _mm256_and_ps(a.hi, m.hi)};
}

INLINE __m128i load_half(const void* p, int half) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p) + half);
}
INLINE __m256 bf16_half(const void* p, int half) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(p, half)), 16));
}

template <DType T>
INLINE Floats load(const void* p) {
  if constexpr (T == DType::F32) {
    const float* const floats = static_cast<const float*>(p);
    return {_mm256_loadu_ps(floats), _mm256_loadu_ps(floats + 8)};
  } else if constexpr (T == DType::F16) {
    return {_mm256_cvtph_ps(load_half(p, 0)), _mm256_cvtph_ps(load_half(p, 1))};
  } else if constexpr (T == DType::BF16) {
    return {bf16_half(p, 0), bf16_half(p, 1)};
  } else {
    const __m128i bytes = load_half(p, 0), high = _mm_srli_si128(bytes, 8);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high))};
  }
}

// The 16 bits of a bfloat16, in the lower half of each element; of what is no NaN.
INLINE __m256i rounded_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v), one = _mm256_set1_epi32(1);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  return _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
}

// The same of a NaN, a quiet one.
INLINE __m256i quiet_bf16(__m256 v) {
  return _mm256_srli_epi32(_mm256_or_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x400000)), 16);
}

INLINE __m256i bf16_of(Floats v) {
  __m256i lo = rounded_bf16(v.lo), hi = rounded_bf16(v.hi);
  if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(v.lo, v.hi, _CMP_UNORD_Q)), false)) {
    const __m256i nan_lo = _mm256_castps_si256(_mm256_cmp_ps(v.lo, v.lo, _CMP_UNORD_Q));
    const __m256i nan_hi = _mm256_castps_si256(_mm256_cmp_ps(v.hi, v.hi, _CMP_UNORD_Q));
    lo = _mm256_blendv_epi8(lo, quiet_bf16(v.lo), nan_lo);
    hi = _mm256_blendv_epi8(hi, quiet_bf16(v.hi), nan_hi);
  }
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8);
}

INLINE __m256i f16_of(Floats v) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return _mm256_set_m128i(_mm256_cvtps_ph(v.hi, nearest), _mm256_cvtps_ph(v.lo, nearest));
}

template <DType T>
INLINE void store(void* p, Floats v) {
  if constexpr (T == DType::F32) {
    _mm256_storeu_ps(static_cast<float*>(p), v.lo);
    _mm256_storeu_ps(static_cast<float*>(p) + 8, v.hi);
  } else if constexpr (T == DType::F16) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), f16_of(v));
  } else if constexpr (T == DType::BF16) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), bf16_of(v));
  } else {
    const __m256i lo = _mm256_cvtps_epi32(v.lo), hi = _mm256_cvtps_epi32(v.hi);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(lo, hi), 0xd8);
    const __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(static_cast<__m128i*>(p), bytes);
  }
}

using Register = __m256i;

template <DType T>
struct Packed { Register part[kPair * size_of(T) / sizeof(Register)]; };

template <DType T>
INLINE Packed<T> pack(Floats a, Floats b) {
  if constexpr (T == DType::F32) {
    return {{_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi), _mm256_castps_si256(b.lo),
             _mm256_castps_si256(b.hi)}};
  } else if constexpr (T == DType::F16) {
    return {{f16_of(a), f16_of(b)}};
  } else {
    return {{bf16_of(a), bf16_of(b)}};
  }
}

INLINE void stream(void* p, Register r) { _mm256_stream_si256(static_cast<__m256i*>(p), r); }

INLINE Doubles load_wide(const double* p) {
  return {{_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4), _mm256_loadu_pd(p + 8),
           _mm256_loadu_pd(p + 12)}};
}
INLINE void store_wide(double* p, Doubles w) {
  for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, w.part[i]);
}
INLINE Doubles widen(Floats v) {
  return {{_mm256_cvtps_pd(_mm256_castps256_ps128(v.lo)),
           _mm256_cvtps_pd(_mm256_extractf128_ps(v.lo, 1)),
           _mm256_cvtps_pd(_mm256_castps256_ps128(v.hi)),
           _mm256_cvtps_pd(_mm256_extractf128_ps(v.hi, 1))}};
}
INLINE Doubles widen(Mask m) {
  const __m256i lo = _mm256_castps_si256(m.lo), hi = _mm256_castps_si256(m.hi);
  return {{_mm256_castsi256_pd(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(lo))),
           _mm256_castsi256_pd(_mm256_cvtepi32_epi64(_mm256_extracti128_si256(lo, 1))),
           _mm256_castsi256_pd(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(hi))),
           _mm256_castsi256_pd(_mm256_cvtepi32_epi64(_mm256_extracti128_si256(hi, 1)))}};
}
INLINE void add_product(Doubles& sum, Doubles a, Doubles b) {
  for (int i = 0; i < 4; ++i) sum.part[i] = _mm256_fmadd_pd(a.part[i], b.part[i], sum.part[i]);
}
INLINE void add_product_where(Doubles& sum, Mask m, Doubles a, Doubles b) {
  const Doubles mask = widen(m);
  for (int i = 0; i < 4; ++i) {
    const __m256d product = _mm256_mul_pd(a.part[i], b.part[i]);
    sum.part[i] = _mm256_add_pd(sum.part[i], _mm256_and_pd(product, mask.part[i]));
  }
}
INLINE bool all_finite(Doubles w) {
  const __m256d infinity = _mm256_set1_pd(__builtin_inf()), sign = _mm256_set1_pd(-0.0);
  __m256d all = _mm256_cmp_pd(infinity, infinity, _CMP_EQ_OQ);
  for (__m256d part : w.part) {
    all = _mm256_and_pd(all, _mm256_cmp_pd(_mm256_andnot_pd(sign, part), infinity, _CMP_LT_OQ));
  }
  return _mm256_movemask_pd(all) == 0xf;
}

struct Stripes {
  __m256i acc[2];

  explicit Stripes(const uint64_t* start) : acc{load(start, 0), load(start, 1)} {}

  void accumulate(const uint8_t* data, const uint8_t* secret) {
    for (int i = 0; i < 2; ++i) {
      const __m256i value = load(data, i), key = _mm256_xor_si256(value, load(secret, i));
      const __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
      const __m256i swapped = _mm256_shuffle_epi32(value, 0x4e);
      acc[i] = _mm256_add_epi64(acc[i], _mm256_add_epi64(product, swapped));
    }
  }

  void scramble(const uint8_t* secret) {
    const __m256i prime = _mm256_set1_epi64x(0x9e3779b1);
    for (int i = 0; i < 2; ++i) {
      __m256i a = _mm256_xor_si256(acc[i], _mm256_srli_epi64(acc[i], 47));
      a = _mm256_xor_si256(a, load(secret, i));
      const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), prime);
      acc[i] = _mm256_add_epi64(_mm256_mul_epu32(a, prime), _mm256_slli_epi64(high, 32));
    }
  }

  void finish(uint64_t* to) const { memcpy(to, acc, sizeof acc); }

 private:
  static __m256i load(const void* p, int half) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p) + half);
  }
};

typedef uint64_t Word __attribute__((vector_size(32)));

INLINE void full_add(Word& digit, Word& carry, Word a, Word b) {
  const Word half = digit ^ a;
  carry = (digit & a) | (half & b);
  digit = half ^ b;
}

#include "xxh3.inc"

#include "count.inc"

#include "kernels_simd.inc"

// Without the instruction that spreads words to the states that need one, vectors gain nothing.
uint64_t unmask(MaskGroup& g) { return kernels_scalar.unmask(g); }

}  // namespace

const Kernels kernels_avx2 = {"avx2",  encode,    decode,  decode_hashed, sums,  hash,
                                agreement, consensus, overlap, zeros,         unmask};

}  // namespace tallcodec

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
