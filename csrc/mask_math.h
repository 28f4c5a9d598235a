// Every formula of the codec, once. The scalar kernels and CUDA call these; the SIMD body, Triton
// and NumPy restate them and are tested against them bit for bit.
//
// All arithmetic is float32 with one rounding per operation, to nearest even, denormals kept. Build
// with -ffp-contract=off (nvcc: -fmad=false).
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __FAST_MATH__
#error "tallcodec's arithmetic must be that of IEEE 754: build it without -ffast-math"
#endif

#ifdef __CUDACC__
#define TALLCODEC_MATH __host__ __device__ inline
#else
#define TALLCODEC_MATH inline
#endif

namespace tallcodec {

TALLCODEC_MATH uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

TALLCODEC_MATH float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

TALLCODEC_MATH float magnitude(float x) { return float_of(float_bits(x) & 0x7fffffff); }
TALLCODEC_MATH bool is_finite(float x) { return (float_bits(x) & 0x7fffffff) < 0x7f800000; }

// Conversions. A NaN stays one: quiet, with its sign and the leading bits of its payload.

TALLCODEC_MATH float bf16_to_f32(uint16_t h) { return float_of(uint32_t{h} << 16); }

TALLCODEC_MATH uint16_t f32_to_bf16(float x) {
  const uint32_t bits = float_bits(x);
  if (x != x) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

TALLCODEC_MATH float f16_to_f32(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ff;
  if (exponent == 0) return float_of(sign | float_bits(float(fraction) * 0x1p-24f));
  if (exponent < 31) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
  return float_of(sign | 0x7f800000 | (fraction ? 0x400000 : 0) | fraction << 13);
}

TALLCODEC_MATH uint16_t f32_to_f16(float x) {
  const uint32_t sign = float_bits(x) >> 16 & 0x8000, bits = float_bits(x) & 0x7fffffff;
  if (bits > 0x7f800000) return uint16_t(sign | 0x7e00 | (bits >> 13 & 0x3ff));
  if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and more round to infinity
  if (bits < 0x38800000) {  // below 2^-14: the addition rounds to a multiple of 2^-24
    return uint16_t(sign | (float_bits(float_of(bits) + 0.5f) - float_bits(0.5f)));
  }
  return uint16_t(sign | (bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13);
}

// The shared vector. A sum that overflows, or meets a NaN or an infinity, becomes 0, and the 16-bit
// types saturate. (Only int8 can still dequantise to an infinity, next to the largest float; no bit
// is set there.)

constexpr float kMaxF16 = 65504.0f, kMaxBF16 = 0x1.fep127f;

TALLCODEC_MATH float shared_value(float sum) { return is_finite(sum) ? sum : 0.0f; }

TALLCODEC_MATH float clamp_to(float x, float limit) {
  return x < -limit ? -limit : x > limit ? limit : x;
}

TALLCODEC_MATH float int8_scale(float absmax) { return absmax / 127.0f; }

TALLCODEC_MATH int8_t quantise(float s, float scale) {
  if (scale == 0) return 0;
  const float to_integer = 0x1.8p23f;  // pushes the fraction out: rounds to nearest even
  return int8_t(clamp_to((s / scale + to_integer) - to_integer, 127.0f));
}

TALLCODEC_MATH float dequantise(int8_t q, float scale) { return float(q) * scale; }

// The mask rule, as published. Stored masks have, besides, a zero wherever s is zero.
TALLCODEC_MATH bool is_active(float base, float task, float s, float threshold) {
  return magnitude(base - task) > threshold * magnitude((base + s) - task);
}

// Adapted masks, in place of the rule above: with factor 2c, but for rounding, those elements where
// tau / s is more than c.
TALLCODEC_MATH bool follows(float tau, float s, float factor) {
  return magnitude(tau) > magnitude(factor * s - tau);
}

// Magnitude masks: the largest elements of the task vector.
TALLCODEC_MATH bool is_large(float base, float task, float threshold) {
  return magnitude(task - base) > threshold;
}

// TIES (arXiv 2306.01708): a task vector's small elements are cut off, a sign is elected by the sum of
// what is left, and what has that sign is summed. Zeros take the sign that most elements have.

TALLCODEC_MATH float trimmed(float tau, float cut) { return magnitude(tau) >= cut ? tau : 0.0f; }

TALLCODEC_MATH float elected_sign(float sum, float majority) {
  return sum > 0 ? 1.0f : sum == 0 ? majority : -1.0f;
}

TALLCODEC_MATH float elected(float trimmed, float sign) {
  return trimmed * sign > 0 ? trimmed : 0.0f;
}

// A select, not an addition of zero: what is not active keeps the base's own value, -0 included.
TALLCODEC_MATH float decoded(float base, float s, float scale, bool active) {
  return active ? base + scale * s : base;
}

// Coded masks. What a mask's bit is likely to be is told by the size of s, half an octave at a time.
TALLCODEC_MATH uint32_t mask_context(float s) {
  const uint32_t bits = float_bits(s) & 0x7fffffff;
  return bits ? 1 + (bits >> 22) : 0;
}

// Takes a bit, whose frequency is f of 2^bits, off a state (rANS, arXiv 1311.2540) and fills that again from a
// word, where it falls below 2^16; says how many words that took.
TALLCODEC_MATH uint32_t take_bit(uint32_t& state, uint32_t f, uint32_t bits, uint32_t word, uint32_t& bit) {
  const uint32_t all = 1u << bits, slot = state & (all - 1);
  bit = slot < f;
  const uint32_t zero = bit - 1;  // all bits, or none: a branch would be guessed wrongly
  const uint32_t x = (f + (zero & (all - 2 * f))) * (state >> bits) + slot - (f & zero);
  const uint32_t low = x < 1 << 16;
  state = x << 16 * low | (word & (0 - low));
  return low;
}

}  // namespace tallcodec
