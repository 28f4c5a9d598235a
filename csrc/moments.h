// The statistics of a coded tensor, and the scale that follows from them.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"

namespace tallcodec {

// The three statistics of a range of elements.
struct Moments {
  double tau_sq = 0, dot = 0, approx_sq = 0;

  void add(const Moments& m) {
    tau_sq += m.tau_sq;
    dot += m.dot;
    approx_sq += m.approx_sq;
  }
};

inline double add_lanes(const double* lanes) {
  double sum[kLanes];
  std::copy(lanes, lanes + kLanes, sum);
  for (uint32_t half = kLanes / 2; half; half /= 2) {
    for (uint32_t i = 0; i < half; ++i) sum[i] += sum[i + half];
  }
  return sum[0];
}

inline Moments moments(const Sums& s) {
  return {add_lanes(s.tau_sq), add_lanes(s.dot), add_lanes(s.approx_sq)};
}

// Of the least-squares scale, how much unit gain may take: 9 times it makes the gain 1 where the cosine
// of what is decoded and tau is 1/3, and tau three times as long. What follows tau less does more harm than good.
constexpr double kMost = 9;

// The scale that makes the gain 1, or what is allowed of it; at most the largest float32.
inline float bounded_gain(const Moments& m) {
  const double g = std::min(m.tau_sq / m.dot, kMost * (m.dot / m.approx_sq));
  return static_cast<float>(std::min(g, double{std::numeric_limits<float>::max()}));
}

// The same of a mask, which may be empty or point away; what becomes of the moments.
inline float unit_gain(const Moments& m) {
  if (m.approx_sq > 0 && !(m.dot > 0)) return 0;
  const float g = static_cast<float>(std::min(m.tau_sq / m.dot, kMost * (m.dot / m.approx_sq)));
  return std::isnormal(g) ? g : 1.0f;
}

inline Moments scaled(const Moments& m, float scale) {
  double g = scale;
  return {m.tau_sq, g * m.dot, (g * m.approx_sq) * g};
}

}  // namespace tallcodec
