// The reference: loops over mask_math.h, and nothing else.
#include <cstring>

#include "float_environment.h"
#include "kernels.h"
#include "mask_math.h"

namespace tallcodec {
namespace {

#include "xxh3.inc"

// Elements are looked at in blocks that end where the int8 scales do.
constexpr uint64_t kBlock = kScaleBlock;

uint64_t min(uint64_t a, uint64_t b) { return a < b ? a : b; }

template <typename T>
const T* at(const void* array, uint64_t first) {
  // Arrays may lie at any address: read elements of them with read().
  return reinterpret_cast<const T*>(static_cast<const char*>(array) + first * sizeof(T));
}

template <typename T>
T read(const void* array, uint64_t i) {
  T value;
  memcpy(&value, at<T>(array, i), sizeof value);
  return value;
}

template <typename T>
void write(void* array, uint64_t i, T value) {
  memcpy(static_cast<char*>(array) + i * sizeof(T), &value, sizeof value);
}

void load(const void* array, DType dtype, uint64_t first, uint64_t n, float* to) {
  switch (dtype) {
    case DType::F32:
      if (n) memcpy(to, at<float>(array, first), n * sizeof *to);
      break;
    case DType::F16:
      for (uint64_t i = 0; i < n; ++i) to[i] = f16_to_f32(read<uint16_t>(array, first + i));
      break;
    default:
      for (uint64_t i = 0; i < n; ++i) to[i] = bf16_to_f32(read<uint16_t>(array, first + i));
  }
}

void store(const float* from, DType dtype, uint64_t first, uint64_t n, void* array) {
  for (uint64_t i = 0; i < n; ++i) {
    switch (dtype) {
      case DType::F32: write(array, first + i, from[i]); break;
      case DType::F16: write(array, first + i, f32_to_f16(from[i])); break;
      default: write(array, first + i, f32_to_bf16(from[i]));
    }
  }
}

// Elements of a shared vector from number `first` of its array on, all of one scale block.
void load_shared(const void* array, DType dtype, float scale, uint64_t first, uint64_t n,
                 float* to) {
  if (dtype != DType::I8) return load(array, dtype, first, n, to);
  for (uint64_t i = 0; i < n; ++i) to[i] = dequantise(read<int8_t>(array, first + i), scale);
}

// Stores one block of sums as the shared vector's type, and leaves in s what a decoder will see.
void store_shared(const EncodeBlock& e, uint64_t first, uint64_t n, float* s) {
  float scale = 0;
  if (e.shared_dtype == DType::I8) {
    float absmax = 0;
    for (uint64_t i = 0; i < n; ++i) absmax = magnitude(s[i]) > absmax ? magnitude(s[i]) : absmax;
    scale = int8_scale(absmax);
    write(e.shared_scales, first / kBlock, scale);
    for (uint64_t i = 0; i < n; ++i) write(e.shared, first + i, quantise(s[i], scale));
  } else {
    for (uint64_t i = 0; i < n; ++i) {
      if (e.shared_dtype == DType::F16) s[i] = clamp_to(s[i], kMaxF16);
      if (e.shared_dtype == DType::BF16) s[i] = clamp_to(s[i], kMaxBF16);
    }
    store(s, e.shared_dtype, first, n, e.shared);
  }
  load_shared(e.shared, e.shared_dtype, scale, first, n, s);
}

// Element i of a range whose first block begins at lane 0.
void add_to_sums(Sums& sums, uint64_t i, float tau, float s, bool active) {
  const double t = tau, a = s;
  sums.tau_sq[i % kLanes] += t * t;
  if (!active) return;
  sums.dot[i % kLanes] += t * a;
  sums.approx_sq[i % kLanes] += a * a;
}

bool obeys(MaskRule rule, float b, float t, float s, float threshold) {
  switch (rule) {
    case MaskRule::Published: return is_active(b, t, s, threshold);
    case MaskRule::Magnitude: return is_large(b, t, threshold);
    default: return follows(t - b, s, threshold);
  }
}

void encode_block(EncodeBlock& e, uint64_t first, uint64_t n) {
  float b[kBlock], s[kBlock] = {}, t[kBlock];
  uint32_t active_tasks[kBlock] = {};

  load(e.base, e.base_dtype, first, n, b);
  for (uint64_t i = 0; i < n; ++i) e.base_nonfinite |= !is_finite(b[i]);
  if (e.merged) memcpy(s, e.merged + first, n * sizeof *s);
  for (uint32_t k = 0; !e.merged && k < e.tasks; ++k) {
    load(e.task[k], e.task_dtype[k], first, n, t);
    for (uint64_t i = 0; i < n; ++i) s[i] += t[i] - b[i];
  }
  for (uint64_t i = 0; i < n; ++i) s[i] = shared_value(s[i]);
  store_shared(e, first, n, s);

  for (uint32_t k = 0; k < e.tasks; ++k) {
    TaskStats& stats = e.stats[k];
    uint8_t mask[kBlock / 8] = {};
    load(e.task[k], e.task_dtype[k], first, n, t);
    for (uint64_t i = 0; i < n; ++i) {
      const bool published = obeys(e.rule, b[i], t[i], s[i], e.threshold[k]);
      const bool active = published && s[i] != 0;
      mask[i / 8] |= uint8_t(active << i % 8);
      active_tasks[i] += published;
      stats.published_bits += published;
      stats.set_bits += active;
      stats.nonfinite |= !is_finite(t[i]);
      add_to_sums(stats.sums, i, t[i] - b[i], s[i], active);
    }
    memcpy(e.mask[k] + first / 8, mask, (n + 7) / 8);
  }
  for (uint64_t i = 0; i < n; ++i) ++e.agreement[active_tasks[i]];
}

__attribute__((noinline)) void encode_all(EncodeBlock& e) {
  for (uint64_t i = 0; i < e.n; i += kBlock) encode_block(e, i, min(kBlock, e.n - i));
}

bool bit(const uint8_t* mask, uint64_t i) { return mask && mask[i / 8] >> i % 8 & 1; }

// Runs visit(i, n, b, s, position) over d's elements i .. i + n, position being where their mask
// bits begin; s is left out where there is no mask.
template <typename Visit>
void for_each_block(const DecodeBlock& d, Visit visit) {
  float b[kBlock], s[kBlock] = {};
  for (uint64_t i = 0, n; i < d.n; i += n) {
    const uint64_t position = d.phase + i;
    n = min(kBlock - position % kBlock, d.n - i);
    load(d.base, d.base_dtype, i, n, b);
    if (d.mask && d.shared_dtype == kSigns) {
      const auto signs = static_cast<const uint8_t*>(d.shared);
      for (uint64_t j = 0; j < n; ++j) s[j] = bit(signs, position + j) ? -1.0f : 1.0f;
    } else if (d.mask) {
      const float scale =
          d.shared_dtype == DType::I8 ? read<float>(d.shared_scales, position / kBlock) : 0;
      load_shared(d.shared, d.shared_dtype, scale, i, n, s);
    }
    visit(i, n, b, s, position);
  }
}

__attribute__((noinline)) void decode_all(const DecodeBlock& d) {
  for_each_block(d, [&](uint64_t i, uint64_t n, float* b, const float* s, uint64_t position) {
    for (uint64_t j = 0; j < n; ++j) b[j] = decoded(b[j], s[j], d.scale, bit(d.mask, position + j));
    store(b, d.out_dtype, i, n, d.out);
  });
}

__attribute__((noinline)) void sum_all(const DecodeBlock& d, const void* task, DType task_dtype,
                                       Sums& sums) {
  for_each_block(d, [&](uint64_t i, uint64_t n, const float* b, const float* s, uint64_t position) {
    float t[kBlock];
    load(task, task_dtype, i, n, t);
    for (uint64_t j = 0; j < n; ++j) {
      add_to_sums(sums, i + j, t[j] - b[j], s[j], bit(d.mask, position + j));
    }
  });
}

void encode(EncodeBlock& e) {
  FloatEnvironment environment;
  encode_all(e);
}

void decode(const DecodeBlock& d) {
  FloatEnvironment environment;
  decode_all(d);
}

void sums(const DecodeBlock& d, const void* task, DType task_dtype, Sums& to) {
  FloatEnvironment environment;
  sum_all(d, task, task_dtype, to);
}

// The eight accumulators of XXH3, one stripe of 64 bytes at a time.
struct ScalarStripes {
  uint64_t acc[8];

  explicit ScalarStripes(const uint64_t* start) { memcpy(acc, start, sizeof acc); }

  void accumulate(const uint8_t* data, const uint8_t* secret) {
    for (int i = 0; i < 8; ++i) {
      const uint64_t value = read<uint64_t>(data, i), key = value ^ read<uint64_t>(secret, i);
      acc[i ^ 1] += value;
      acc[i] += (key & 0xffffffff) * (key >> 32);
    }
  }

  void scramble(const uint8_t* secret) {
    for (int i = 0; i < 8; ++i) {
      acc[i] = (acc[i] ^ acc[i] >> 47 ^ read<uint64_t>(secret, i)) * xxh3::kPrime32_1;
    }
  }

  void finish(uint64_t* to) const { memcpy(to, acc, sizeof acc); }
};

uint64_t hash(const void* data, size_t size) { return xxh3::hash<ScalarStripes>(data, size); }

void hash_blocks(const void* data, uint64_t size, uint64_t* to) {
  for (uint64_t at = 0; at < size; at += kSumBlock) *to++ = hash(static_cast<const uint8_t*>(data) + at, kSumBlock);
}

void decode_hashed(const DecodeBlock& d, uint64_t* base, uint64_t* shared) {
  hash_blocks(d.base, d.n * size_of(d.base_dtype), base);
  if (d.mask && d.shared_dtype != kSigns) hash_blocks(d.shared, d.n * size_of(d.shared_dtype), shared);
  decode(d);
}

uint32_t active_tasks(const MaskBlock& b, uint64_t i) {
  uint32_t active = 0;
  for (uint32_t k = 0; k < b.masks; ++k) active += bit(b.mask[k], i);
  return active;
}

void agreement(const MaskBlock& b, uint64_t* counts) {
  for (uint64_t i = 0; i < b.n; ++i) ++counts[active_tasks(b, i)];
}

void consensus(const MaskBlock& b, uint32_t least, uint8_t* out) {
  memset(out, 0, (b.n + 7) / 8);
  for (uint64_t i = 0; i < b.n; ++i) {
    out[i / 8] |= uint8_t((active_tasks(b, i) >= least) << i % 8);
  }
}

void overlap(const MaskBlock& b, uint64_t* pairs) {
  for (uint32_t x = 0; x < b.masks; ++x) {
    for (uint32_t y = x; y < b.masks; ++y) {
      uint64_t& both = pairs[uint64_t{x} * b.masks + y];
      for (uint64_t i = 0; i < b.n; ++i) both += bit(b.mask[x], i) && bit(b.mask[y], i);
    }
  }
}

__attribute__((noinline)) uint64_t zeros_of_all(const void* shared, DType dtype,
                                                const float* scales, uint64_t n) {
  uint64_t zeros = 0;
  for (uint64_t i = 0; i < n; i += kBlock) {
    float s[kBlock];
    const uint64_t size = min(kBlock, n - i);
    load_shared(shared, dtype, scales ? read<float>(scales, i / kBlock) : 0, i, size, s);
    for (uint64_t j = 0; j < size; ++j) zeros += s[j] == 0;
  }
  return zeros;
}

uint64_t zeros(const void* shared, DType dtype, const float* scales, uint64_t n) {
  FloatEnvironment environment;
  return zeros_of_all(shared, dtype, scales, n);
}

uint64_t unmask(MaskGroup& g) {
  float s[kMaskGroup];
  load_shared(g.shared, g.shared_dtype, g.scale, 0, kMaskGroup, s);
  uint64_t bits = 0;
  for (uint32_t i = 0; i < kMaskGroup; ++i) {
    uint32_t bit;
    const uint32_t f = g.frequency[mask_context(s[i])], word = read<uint16_t>(g.word, 0);
    g.word += 2 * take_bit(g.state[i % kMaskStates], f, kMaskBits, word, bit);
    bits |= uint64_t{bit} << i;
  }
  return bits;
}

}  // namespace

const Kernels kernels_scalar = {"scalar",  encode,    decode,  decode_hashed, sums,  hash,
                                agreement, consensus, overlap, zeros,         unmask};

}  // namespace tallcodec
