#include "merge.h"

#include <algorithm>
#include <cstring>

#include "float_environment.h"
#include "mask_math.h"

namespace tallcodec {
namespace {

constexpr uint64_t kChunk = 512;  // elements at a time: what is computed of them stays in cache

constexpr uint32_t kRatioShift = 21;               // leaves the exponent and two bits of the fraction
constexpr uint32_t kFirstRatio = (127 - 20) << 2;  // of 2^-20
constexpr uint32_t kHalfRatioBin = 1 << (kRatioShift - 1);

template <typename T, typename Convert>
void load(const void* array, uint64_t first, uint64_t n, float* to, Convert convert) {
  const char* from = static_cast<const char*>(array) + first * sizeof(T);
  for (uint64_t i = 0; i < n; ++i) {
    T value;
    std::memcpy(&value, from + i * sizeof value, sizeof value);
    to[i] = convert(value);
  }
}

void load(const void* array, DType dtype, uint64_t first, uint64_t n, float* to) {
  switch (dtype) {
    case DType::F32: return load<float>(array, first, n, to, [](float x) { return x; });
    case DType::F16: return load<uint16_t>(array, first, n, to, f16_to_f32);
    default: return load<uint16_t>(array, first, n, to, bf16_to_f32);
  }
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

float least_ratio(uint32_t bin) {
  return float_of(((kFirstRatio + bin) << kRatioShift) - kHalfRatioBin);
}

void add_ratios(const MergeBlock& block, uint32_t task, const float* s, RatioBin* bins) {
  FloatEnvironment environment;
  const float least = least_ratio(0);
  for (uint64_t first = 0; first < block.n; first += kChunk) {
    Chunk chunk(block, first);
    const float* tau = chunk.task_vector(task);
    for (uint64_t i = 0; i < chunk.size(); ++i) {
      const float divisor = s[first + i], ratio = tau[i] / divisor;
      if (!(ratio >= least) || divisor == 0) continue;
      const uint32_t bin = ((float_bits(ratio) + kHalfRatioBin) >> kRatioShift) - kFirstRatio;
      RatioBin& sums = bins[std::min(bin, kRatioBins - 1)];
      const double t = tau[i], a = divisor;
      sums.dot += t * a;
      sums.approx_sq += a * a;
    }
  }
}

uint32_t find_bin(const uint64_t* bins, uint64_t& rank) {
  uint32_t bin = 0;
  for (; bin < kBins - 1 && rank >= bins[bin]; ++bin) rank -= bins[bin];
  return bin;
}

}  // namespace tallcodec
