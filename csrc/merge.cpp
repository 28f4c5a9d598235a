#include "merge.h"

#include <algorithm>
#include <cstring>

#include "float_environment.h"
#include "kernels.h"
#include "mask_math.h"
#include "to_float32.h"

namespace tallcodec {
namespace {

constexpr uint64_t kChunk = 512;  // elements at a time: what is computed of them stays in cache

constexpr int32_t kRatioShift = 21;  // leaves the exponent and two bits of the fraction
constexpr int32_t kBeforeRatios = ((127 - 20) << 2) - 1;  // bin 0, in effect: bin 1 is of 2^-20
constexpr int32_t kHalfRatioBin = 1 << (kRatioShift - 1);

void load(const void* array, DType dtype, uint64_t first, uint64_t n, float* to) {
  to_float32(static_cast<const uint8_t*>(array) + first * size_of(dtype), dtype, n, to);
}

// The task vectors of a chunk of a block, one after the other in one place.
class Chunk {
 public:
  Chunk(const MergeBlock& block, uint64_t first)
      : block_(block), first_(first), n_(std::min(kChunk, block.n - first)) {
    load(block.base, block.base_dtype, first, n_, base_);
  }

  uint64_t size() const { return n_; }

  const float* task_vector(uint32_t task) {
    load(block_.task[task], block_.task_dtype[task], first_, n_, tau_);
    for (uint64_t i = 0; i < n_; ++i) tau_[i] -= base_[i];
    return tau_;
  }

 private:
  const MergeBlock& block_;
  const uint64_t first_, n_;
  float base_[kChunk], tau_[kChunk];
};

void sum(const MergeBlock& b, Chunk& chunk, float* out) {
  std::fill_n(out, chunk.size(), 0.0f);
  for (uint32_t k = 0; k < b.tasks; ++k) {
    const float* tau = chunk.task_vector(k);
    for (uint64_t i = 0; i < chunk.size(); ++i) out[i] += tau[i];
  }
}

void sum_trimmed(const MergeBlock& b, Chunk& chunk, float* out) {
  std::fill_n(out, chunk.size(), 0.0f);
  for (uint32_t k = 0; k < b.tasks; ++k) {
    const float* tau = chunk.task_vector(k);
    for (uint64_t i = 0; i < chunk.size(); ++i) out[i] += trimmed(tau[i], b.cut[k]);
  }
}

void sum_elected(const MergeBlock& b, Chunk& chunk, float* out) {
  float sign[kChunk];
  sum_trimmed(b, chunk, sign);
  for (uint64_t i = 0; i < chunk.size(); ++i) sign[i] = elected_sign(sign[i], b.majority);
  std::fill_n(out, chunk.size(), 0.0f);
  for (uint32_t k = 0; k < b.tasks; ++k) {
    const float* tau = chunk.task_vector(k);
    for (uint64_t i = 0; i < chunk.size(); ++i) {
      out[i] += elected(trimmed(tau[i], b.cut[k]), sign[i]);
    }
  }
}

__attribute__((noinline)) void merge_chunks(const MergeBlock& b, float* merged) {
  for (uint64_t first = 0; first < b.n; first += kChunk) {
    Chunk chunk(b, first);
    float* out = merged + first;
    if (b.rule == Merge::Ties) {
      sum_elected(b, chunk, out);
    } else {
      sum(b, chunk, out);
    }
    if (b.rule == Merge::Average) {
      for (uint64_t i = 0; i < chunk.size(); ++i) out[i] /= static_cast<float>(b.averaged);
    }
  }
}

__attribute__((noinline)) int64_t count_chunks(const MergeBlock& b) {
  int64_t votes = 0;
  float election[kChunk];
  for (uint64_t first = 0; first < b.n; first += kChunk) {
    Chunk chunk(b, first);
    sum_trimmed(b, chunk, election);
    for (uint64_t i = 0; i < chunk.size(); ++i) votes += (election[i] > 0) - (election[i] < 0);
  }
  return votes;
}

}  // namespace

void merge(const MergeBlock& block, float* merged) {
  FloatEnvironment environment;
  merge_chunks(block, merged);
}

int64_t count_signs(const MergeBlock& block) {
  FloatEnvironment environment;
  return count_chunks(block);
}

bool has_nonfinite(const void* array, DType dtype, uint64_t n) {
  FloatEnvironment environment;
  float values[kChunk];
  bool finite = true;
  for (uint64_t first = 0; first < n; first += kChunk) {
    const uint64_t size = std::min(kChunk, n - first);
    load(array, dtype, first, size, values);
    for (uint64_t i = 0; i < size; ++i) finite &= is_finite(values[i]);
  }
  return !finite;
}

void count_magnitudes(const MergeBlock& block, uint32_t task, uint32_t upper, uint64_t* bins) {
  FloatEnvironment environment;
  for (uint64_t first = 0; first < block.n; first += kChunk) {
    Chunk chunk(block, first);
    const float* tau = chunk.task_vector(task);
    for (uint64_t i = 0; i < chunk.size(); ++i) {
      const uint32_t bits = float_bits(magnitude(tau[i]));
      if (upper == kAnyUpper) {
        ++bins[bits >> 16];
      } else if (bits >> 16 == upper) {
        ++bins[bits & 0xffff];
      }
    }
  }
}

void round_to_shared(DType dtype, uint64_t n, float* s) {
  FloatEnvironment environment;
  if (dtype == DType::F16) {
    for (uint64_t i = 0; i < n; ++i) s[i] = f16_to_f32(f32_to_f16(clamp_to(s[i], kMaxF16)));
  } else if (dtype == DType::BF16) {
    for (uint64_t i = 0; i < n; ++i) s[i] = bf16_to_f32(f32_to_bf16(clamp_to(s[i], kMaxBF16)));
  } else if (dtype == DType::I8) {
    for (uint64_t first = 0; first < n; first += kScaleBlock) {
      const uint64_t end = std::min<uint64_t>(first + kScaleBlock, n);
      float absmax = 0;
      for (uint64_t i = first; i < end; ++i) absmax = std::max(absmax, magnitude(s[i]));
      const float scale = int8_scale(absmax);
      for (uint64_t i = first; i < end; ++i) s[i] = dequantise(quantise(s[i], scale), scale);
    }
  }
}

float least_ratio(uint32_t bin) {
  return float_of(((kBeforeRatios + bin) << kRatioShift) - kHalfRatioBin);
}

void add_ratios(const MergeBlock& block, uint32_t task, const float* s, RatioBin* bins) {
  FloatEnvironment environment;
  for (uint64_t first = 0; first < block.n; first += kChunk) {
    Chunk chunk(block, first);
    const float* tau = chunk.task_vector(task);
    for (uint64_t i = 0; i < chunk.size(); ++i) {
      // No branch on what is as good as random: negative ratios have negative bits. Where s is zero the
      // ratio may be anything, tau infinite, and nothing is added.
      const uint32_t bits = float_bits(tau[i] / s[first + i]);
      const auto bin = static_cast<int32_t>((bits + kHalfRatioBin) >> kRatioShift) - kBeforeRatios;
      RatioBin& sums = bins[std::clamp<int32_t>(bits >> 31 ? 0 : bin, 0, kRatioBins - 1)];
      const double a = s[first + i], t = a != 0 ? tau[i] : 0;
      sums.dot += t * a;
      sums.approx_sq += a * a;
      sums.count += a != 0;
    }
  }
}

uint32_t find_bin(const uint64_t* bins, uint64_t& rank) {
  uint32_t bin = 0;
  for (; bin < kBins - 1 && rank >= bins[bin]; ++bin) rank -= bins[bin];
  return bin;
}

}  // namespace tallcodec
