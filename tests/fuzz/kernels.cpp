// Every variant of the kernels, and the GPU's programs on the host, against the scalar ones: any lengths, phases,
// types and values, bit for bit. NaNs may have any payload: of two operands' either may come out.
#include "kernels.h"

#include "float_environment.h"
#include "fuzz.h"
#include "gpu.h"
#include "mask_math.h"

using namespace tallcodec;

namespace {

constexpr uint64_t bytes_of(uint64_t n) { return (n + 7) / 8; }

uint64_t elements(Input& in) { return in.take<uint16_t>() % (in.below(8) ? 400 : 3000); }

// Values of any bits, or near each other, as those of checkpoints are.
Buffer values(Input& in, uint64_t n, DType dtype, size_t gap) {
  const uint32_t size = size_of(dtype);
  std::vector<uint8_t> raw = in.bytes(n * size);
  if (in.below(2) && size > 1) {
    const uint8_t high = in.take<uint8_t>();
    for (uint64_t i = 0; i < n; ++i) raw[(i + 1) * size - 1] = uint8_t((high & 0x7f) ^ (raw[(i + 1) * size - 1] & 0x81));
  }
  return Buffer(raw, gap);
}

bool is_nan(const uint8_t* array, DType dtype, uint64_t i) {
  uint16_t half;
  float x;
  if (dtype == DType::I8) return false;
  if (dtype == DType::F32) {
    std::memcpy(&x, array + 4 * i, 4);
    return x != x;
  }
  std::memcpy(&half, array + 2 * i, 2);
  return (half & 0x7fff) > (dtype == DType::F16 ? 0x7c00 : 0x7f80);
}

bool same(const Buffer& a, const Buffer& b, DType dtype) {
  if (a == b) return true;
  const uint32_t size = size_of(dtype);
  for (uint64_t i = 0; i < a.size() / size; ++i) {
    const bool nans = is_nan(a.data(), dtype, i) && is_nan(b.data(), dtype, i);
    if (!nans && std::memcmp(a.data() + i * size, b.data() + i * size, size) != 0) return false;
  }
  return true;
}

bool same(double a, double b) { return std::memcmp(&a, &b, sizeof a) == 0 || (a != a && b != b); }

bool same(const double* a, const double* b, uint32_t count) {
  for (uint32_t i = 0; i < count; ++i) {
    if (!same(a[i], b[i])) return false;
  }
  return true;
}

bool same(const Sums& a, const Sums& b) {
  return same(a.tau_sq, b.tau_sq, kLanes) && same(a.dot, b.dot, kLanes) && same(a.approx_sq, b.approx_sq, kLanes);
}

// Where buffers of a run begin, from aligned addresses: the CPU's kernels take any, the GPU's those of elements.
size_t gap_of(Input& in) { return in.below(4) ? 0 : in.below(16); }

// What is decoded, or summed: elements first .. first + n of a tensor.
struct Stored {
  uint64_t n, first;
  DType base_dtype, shared_dtype, other_dtype;
  float scale;
  bool masked;
  Buffer base, shared, scales, mask, task;

  explicit Stored(Input& in)
      : n(elements(in)), first(in.below(128)), base_dtype(in.one_of(kFloats)),
        shared_dtype(in.below(5) ? in.one_of(kShared) : kSigns), other_dtype(in.below(2) ? base_dtype : in.one_of(kFloats)),
        scale(in.take<float>()), masked(in.below(8)), base(values(in, n, base_dtype, gap_of(in))),
        shared(shared_dtype == kSigns ? Buffer(in.bytes(bytes_of(first + n)), gap_of(in)) : values(in, n, shared_dtype, gap_of(in))),
        scales(values(in, (first + n + kScaleBlock - 1) / kScaleBlock, DType::F32, gap_of(in))),
        mask(in.bytes(bytes_of(first + n)), gap_of(in)), task(values(in, n, other_dtype, gap_of(in))) {}

  DecodeBlock block() const {
    DecodeBlock d{};
    d.n = n;
    d.phase = uint32_t(first);
    d.base = base.data();
    d.base_dtype = base_dtype;
    d.shared_dtype = shared_dtype;
    d.scale = scale;
    d.out_dtype = other_dtype;
    if (!masked) return d;
    d.shared = shared.data();
    if (shared_dtype == DType::I8) d.shared_scales = scales.as<float>();
    d.mask = mask.data();
    return d;
  }
};

// The same at addresses that the GPU's kernels take: multiples of the elements' size, sometimes of a vector's.
Buffer realigned(const Buffer& b, uint32_t size, uint32_t elements) {
  return Buffer(std::vector<uint8_t>(b.data(), b.data() + b.size()), size * elements);
}

void decode_and_sum(Input& in) {
  const Stored s(in);
  const uint32_t out_size = size_of(s.other_dtype);
  const auto decode = [&](const Kernels& k, size_t gap) {
    DecodeBlock d = s.block();
    Buffer out(s.n * out_size, gap);
    d.out = out.data();
    k.decode(d);
    return out;
  };
  const auto sum = [&](const Kernels& k) {
    Sums sums{};
    k.sums(s.block(), s.task.data(), s.other_dtype, sums);
    return sums;
  };
  const Buffer expected = decode(kernels_scalar, 0);
  const Sums expected_sums = sum(kernels_scalar);
  for (auto k = available_kernels(); *k; ++k) {
    EXPECT(same(decode(**k, gap_of(in)), expected, s.other_dtype));
    EXPECT(same(sum(**k), expected_sums));
  }

  const uint32_t shift = in.below(2) ? in.below(9) : uint32_t(s.first % 16);
  const Buffer base = realigned(s.base, size_of(s.base_dtype), shift), task = realigned(s.task, out_size, shift);
  const Buffer shared = realigned(s.shared, s.shared_dtype == kSigns ? 1 : size_of(s.shared_dtype), shift);
  const Buffer scales = realigned(s.scales, 4, 0), out(s.n * out_size, out_size * shift);
  GpuBlock g{s.block(), nullptr, 1};
  g.block.base = base.data();
  if (s.masked) g.block.shared = shared.data();
  if (g.block.shared_scales) g.block.shared_scales = scales.as<float>();
  g.block.out = out.data();
  kernels_cuda_host.decode({}, &g, 1);
  EXPECT(same(out, expected, s.other_dtype));
  Buffer units(3 * kLanes * sizeof(double));
  std::memset(units.data(), 0, units.size());
  if (s.n) kernels_cuda_host.sums({}, g, task.data(), s.other_dtype, units.as<double>());
  const double* const sums = units.as<double>();
  if (s.n) {
    EXPECT(same(sums, expected_sums.tau_sq, kLanes) && same(sums + kLanes, expected_sums.dot, kLanes) &&
           same(sums + 2 * kLanes, expected_sums.approx_sq, kLanes));
  }

  // With a scale for each row; the CPU's kernels go row by row.
  const uint64_t rows = 1 + in.below(9), length = s.n / rows;
  if (!length || !s.masked) return;
  const Buffer row_scales = values(in, rows, DType::F32, 0);
  g.block.phase = 0;
  g.block.n = rows * length;
  g.row_scales = row_scales.as<float>();
  g.row_length = length;
  const Buffer by_rows(g.block.n * out_size, out_size * shift), rows_expected(g.block.n * out_size);
  g.block.out = by_rows.data();
  kernels_cuda_host.decode({}, &g, 1);
  for (uint64_t r = 0; r < rows; ++r) {
    DecodeBlock d = s.block();
    const uint64_t i = r * length, bits = (i - i % kScaleBlock) / 8;
    d.n = length;
    d.phase = uint32_t(i % kScaleBlock);
    d.base = s.base.data() + i * size_of(s.base_dtype);
    d.mask = s.mask.data() + bits;
    d.shared = s.shared_dtype == kSigns ? s.shared.data() + bits : s.shared.data() + i * size_of(s.shared_dtype);
    if (d.shared_scales) d.shared_scales = reinterpret_cast<const float*>(s.scales.data() + i / kScaleBlock * 4);
    d.scale = row_scales.as<float>()[r];
    d.out = rows_expected.data() + i * out_size;
    kernels_scalar.decode(d);
  }
  EXPECT(same(by_rows, rows_expected, s.other_dtype));
}

// Whole checksum blocks, decoded and hashed at once.
void decode_hashed(Input& in) {
  const DType base_dtype = in.one_of(kFloats), out_dtype = in.one_of(kFloats);
  const DType shared_dtype = in.below(4) ? in.one_of(kShared) : kSigns;
  const float scale = in.take<float>();
  const bool hashes_shared = shared_dtype != kSigns;
  const uint32_t base_size = size_of(base_dtype), shared_size = hashes_shared ? size_of(shared_dtype) : base_size;
  const uint64_t n = kSumBlock / std::min(base_size, shared_size);
  const Buffer base = values(in, n, base_dtype, gap_of(in)), scales = values(in, n / kScaleBlock, DType::F32, 0);
  const Buffer mask(in.bytes(n / 8), gap_of(in));
  const Buffer shared = hashes_shared ? values(in, n, shared_dtype, gap_of(in)) : Buffer(in.bytes(n / 8), gap_of(in));
  struct Found {
    Buffer out;
    std::vector<uint64_t> base, shared;
  };
  const auto run = [&](const Kernels& k, size_t gap) {
    Found f{Buffer(n * size_of(out_dtype), gap), std::vector<uint64_t>(n * base_size / kSumBlock),
            std::vector<uint64_t>(hashes_shared ? n * shared_size / kSumBlock : 0)};
    DecodeBlock d{};
    d.n = n;
    d.base = base.data();
    d.base_dtype = base_dtype;
    d.shared = shared.data();
    d.shared_dtype = shared_dtype;
    if (shared_dtype == DType::I8) d.shared_scales = scales.as<float>();
    d.mask = mask.data();
    d.scale = scale;
    d.out = f.out.data();
    d.out_dtype = out_dtype;
    k.decode_hashed(d, f.base.data(), f.shared.data());
    return f;
  };
  const Found expected = run(kernels_scalar, 0);
  for (auto k = available_kernels(); *k; ++k) {
    const Found f = run(**k, gap_of(in));
    EXPECT(same(f.out, expected.out, out_dtype) && f.base == expected.base && f.shared == expected.shared);
  }
}

struct Encoded {
  Buffer shared, scales;
  std::vector<Buffer> masks;
  std::vector<TaskStats> stats;
  std::vector<uint64_t> agreement;
  bool base_nonfinite = false;

  bool same_bits(const Encoded& o) const {
    for (size_t k = 0; k < stats.size(); ++k) {
      const TaskStats &a = stats[k], &b = o.stats[k];
      if (a.set_bits != b.set_bits || a.published_bits != b.published_bits || a.nonfinite != b.nonfinite) return false;
    }
    return shared == o.shared && scales == o.scales && masks == o.masks && agreement == o.agreement &&
           base_nonfinite == o.base_nonfinite;
  }
  bool operator==(const Encoded& o) const {
    for (size_t k = 0; k < stats.size(); ++k) {
      if (!same(stats[k].sums, o.stats[k].sums)) return false;
    }
    return same_bits(o);
  }
};

void encode(Input& in) {
  const uint64_t n = elements(in);
  const uint32_t tasks = in.below(in.below(4) ? 4 : 12);
  const DType base_dtype = in.one_of(kFloats), shared_dtype = in.one_of(kShared);
  const bool mixed = in.below(4) == 0, merge = in.below(4) == 0;
  const MaskRule rule = in.one_of({MaskRule::Published, MaskRule::Magnitude, MaskRule::Adapted});
  const Buffer base = values(in, n, base_dtype, gap_of(in)), merged = values(in, n, DType::F32, gap_of(in));
  std::vector<DType> dtypes;
  std::vector<Buffer> task;
  std::vector<float> thresholds;
  for (uint32_t k = 0; k < tasks; ++k) {
    dtypes.push_back(mixed ? in.one_of(kFloats) : base_dtype);
    task.push_back(values(in, n, dtypes[k], gap_of(in)));
    thresholds.push_back(in.below(2) ? 0.4f : in.take<float>());
    if (rule == MaskRule::Published) thresholds[k] = magnitude(thresholds[k]);
  }
  const uint64_t blocks = (n + kScaleBlock - 1) / kScaleBlock;
  const auto empty = [&](size_t gap) {
    Encoded e{Buffer(n * size_of(shared_dtype), gap), Buffer(shared_dtype == DType::I8 ? 4 * blocks : 0, gap), {},
              std::vector<TaskStats>(tasks), std::vector<uint64_t>(tasks + 1)};
    for (uint32_t k = 0; k < tasks; ++k) e.masks.emplace_back(bytes_of(n), gap);
    return e;
  };
  const auto run = [&](const Kernels& kernels, size_t gap, uint64_t piece) {
    Encoded to = empty(gap);
    for (uint64_t first = 0; first < n; first += piece) {
      std::vector<const void*> task_here;
      std::vector<uint8_t*> masks;
      for (uint32_t k = 0; k < tasks; ++k) {
        task_here.push_back(task[k].data() + first * size_of(dtypes[k]));
        masks.push_back(to.masks[k].data() + first / 8);
      }
      EncodeBlock e{};
      e.n = std::min(piece, n - first);
      e.tasks = tasks;
      e.base = base.data() + first * size_of(base_dtype);
      e.base_dtype = base_dtype;
      e.task = task_here.data();
      e.task_dtype = dtypes.data();
      e.rule = rule;
      e.threshold = thresholds.data();
      if (merge) e.merged = reinterpret_cast<const float*>(merged.data() + 4 * first);
      e.shared = to.shared.data() + first * size_of(shared_dtype);
      e.shared_dtype = shared_dtype;
      e.shared_scales = reinterpret_cast<float*>(to.scales.data() + (shared_dtype == DType::I8 ? first / kScaleBlock * 4 : 0));
      e.mask = masks.data();
      e.stats = to.stats.data();
      e.agreement = to.agreement.data();
      kernels.encode(e);
      to.base_nonfinite |= e.base_nonfinite;
    }
    return to;
  };
  const Encoded expected = run(kernels_scalar, 0, n + 1);
  for (auto k = available_kernels(); *k; ++k) {
    EXPECT(run(**k, gap_of(in), n + 1) == expected);
    EXPECT(run(**k, gap_of(in), kScaleBlock * (1 + in.below(5))) == expected);
  }

  const bool aligned = !mixed && in.below(2);
  const auto move = [&](const Buffer& b, uint32_t size) { return realigned(b, size, aligned ? 0 : in.below(5)); };
  const Buffer gpu_base = move(base, size_of(base_dtype)), gpu_merged = move(merged, 4);
  std::vector<Buffer> gpu_values;
  std::vector<GpuTask> gpu_tasks(tasks);
  Encoded to = empty(0);
  for (uint32_t k = 0; k < tasks; ++k) gpu_values.push_back(move(task[k], size_of(dtypes[k])));
  for (uint32_t k = 0; k < tasks; ++k) gpu_tasks[k] = {gpu_values[k].data(), to.masks[k].data(), thresholds[k], dtypes[k]};
  std::vector<int64_t> set(tasks), published(tasks), agreement(tasks + 1);
  std::vector<int32_t> nonfinite(tasks + 1);
  GpuEncode e{};
  e.n = n;
  e.base = gpu_base.data();
  e.base_dtype = base_dtype;
  e.shared_dtype = shared_dtype;
  e.rule = rule;
  e.aligned = aligned;
  e.tasks = tasks;
  std::copy_n(gpu_tasks.begin(), std::min(tasks, kGpuHeld), e.held);
  e.task = gpu_tasks.data();
  if (merge) e.merged = gpu_merged.as<float>();
  e.shared = to.shared.data();
  e.shared_scales = to.scales.as<float>();
  e.set_bits = set.data();
  e.published_bits = published.data();
  e.agreement = agreement.data();
  e.nonfinite = nonfinite.data();
  kernels_cuda_host.encode({}, e);
  for (uint32_t k = 0; k < tasks; ++k) {
    to.stats[k].set_bits = uint64_t(set[k]);
    to.stats[k].published_bits = uint64_t(published[k]);
    to.stats[k].nonfinite = nonfinite[k];
  }
  to.agreement.assign(agreement.begin(), agreement.end());
  to.base_nonfinite = nonfinite[tasks];
  EXPECT(to.same_bits(expected));
}

void count(Input& in) {
  const uint32_t tasks = 1 + in.below(in.below(16) ? 9 : 40);  // the GPU's programs take long for many
  const uint64_t n = elements(in) * (1 + in.below(4));
  std::vector<Buffer> masks;
  std::vector<const uint8_t*> planes;
  for (uint32_t k = 0; k < tasks; ++k) masks.emplace_back(in.bytes(bytes_of(n)), gap_of(in));
  for (const Buffer& mask : masks) planes.push_back(mask.data());
  const uint32_t least = 1 + in.below(tasks + 1);
  struct Counts {
    std::vector<uint64_t> agreement, overlap;
    Buffer consensus;
  };
  const auto count = [&](const Kernels& k, size_t gap) {
    Counts c{std::vector<uint64_t>(tasks + 1), std::vector<uint64_t>(uint64_t{tasks} * tasks), Buffer(bytes_of(n), gap)};
    const MaskBlock block{n, tasks, planes.data()};
    k.agreement(block, c.agreement.data());
    k.overlap(block, c.overlap.data());
    k.consensus(block, least, c.consensus.data());
    return c;
  };
  const Counts expected = count(kernels_scalar, 0);
  for (auto k = available_kernels(); *k; ++k) {
    const Counts c = count(**k, gap_of(in));
    EXPECT(c.agreement == expected.agreement && c.overlap == expected.overlap && c.consensus == expected.consensus);
  }
  std::vector<int64_t> agreement(tasks + 1), overlap(uint64_t{tasks} * tasks);
  const Buffer consensus(bytes_of(n), gap_of(in));
  const GpuMasks m{n, tasks, planes.data()};
  kernels_cuda_host.agreement({}, m, agreement.data());
  kernels_cuda_host.overlap({}, m, overlap.data());
  kernels_cuda_host.consensus({}, m, least, consensus.data());
  EXPECT(std::equal(agreement.begin(), agreement.end(), expected.agreement.begin()));
  EXPECT(std::equal(overlap.begin(), overlap.end(), expected.overlap.begin()));
  EXPECT(consensus == expected.consensus);
}

void hash_and_zeros(Input& in) {
  const Buffer data(in.bytes(in.take<uint16_t>() % 9000 / 64 * 64), gap_of(in));
  const DType dtype = in.one_of(kShared);
  const uint64_t n = elements(in);
  const Buffer shared = values(in, n, dtype, gap_of(in));
  const Buffer scales = values(in, (n + kScaleBlock - 1) / kScaleBlock, DType::F32, gap_of(in));
  const auto zeros = [&](const Kernels& k) { return k.zeros(shared.data(), dtype, scales.as<float>(), n); };
  for (auto k = available_kernels(); *k; ++k) {
    EXPECT((*k)->hash(data.data(), data.size()) == kernels_scalar.hash(data.data(), data.size()));
    EXPECT(zeros(**k) == zeros(kernels_scalar));
  }
}

// One group of a coded mask, of any states, frequencies and words.
void unmask(Input& in) {
  const DType dtype = in.one_of(kShared);
  const Buffer shared = values(in, kMaskGroup, dtype, gap_of(in)), words(in.bytes(2 * (kMaskGroup + 16)), gap_of(in));
  const float scale = in.below(2) ? 0.5f : in.take<float>();
  uint16_t frequency[kMaskContexts + 2] = {};
  const std::vector<uint8_t> chosen = in.bytes(2 * kMaskContexts);
  for (uint32_t c = 1; c < kMaskContexts; ++c) {
    std::memcpy(&frequency[c], &chosen[2 * c], 2);
    frequency[c] = uint16_t(frequency[c] % ((1 << kMaskBits) + 1));
  }
  uint32_t states[kMaskStates];
  for (uint32_t& x : states) x = kLeast + in.take<uint32_t>() % 0xffff0000u;
  struct Found {
    uint64_t bits;
    uint32_t state[kMaskStates];
    ptrdiff_t used;
    bool operator==(const Found& o) const {
      return bits == o.bits && used == o.used && std::memcmp(state, o.state, sizeof state) == 0;
    }
  };
  FloatEnvironment environment;
  const auto run = [&](const Kernels& k) {
    Found f{};
    std::memcpy(f.state, states, sizeof states);
    MaskGroup group{shared.data(), dtype, scale, frequency, f.state, words.data()};
    f.bits = k.unmask(group);
    f.used = group.word - words.data();
    return f;
  };
  for (auto k = available_kernels(); *k; ++k) EXPECT(run(**k) == run(kernels_scalar));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  switch (in.below(6)) {
    case 0: decode_and_sum(in); break;
    case 1: encode(in); break;
    case 2: count(in); break;
    case 3: hash_and_zeros(in); break;
    case 4: decode_hashed(in); break;
    default: unmask(in);
  }
  return 0;
}
