// Every kernel variant against the scalar one, bit for bit; the scalar one's conversions against
// plain arithmetic. Buffers end, or begin, at a page that must not be touched.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "float_environment.h"
#include "kernels.h"
#include "mask_math.h"

using namespace tallcodec;

namespace {

struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15 + 1) {}
  uint32_t bits() {
    state = state * 6364136223846793005 + 1442695040888963407;
    return uint32_t(state >> 32);
  }
  uint32_t below(uint32_t n) { return uint32_t(uint64_t{bits()} * n >> 32); }
  float uniform() { return float(bits() >> 8) * 0x1p-24f; }
  float normal() {
    float sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }
};

// Memory between two pages that fault. A buffer lies against one of them, `gap` bytes away, so that
// it is misaligned, too; what is left around it is filled and must stay as it was.
class Guarded {
 public:
  explicit Guarded(size_t capacity) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    room_ = (capacity + 4096 + page - 1) / page * page;
    char* const all = static_cast<char*>(mmap(nullptr, room_ + 2 * page, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (all == MAP_FAILED) std::abort();
    mprotect(all, page, PROT_NONE);
    mprotect(all + page + room_, page, PROT_NONE);
    begin_ = all + page;
  }

  char* place(size_t size, bool at_end, size_t gap) {
    size_ = size;
    buffer_ = at_end ? begin_ + room_ - size - gap : begin_ + gap;
    std::memset(left(), kFill, size_t(buffer_ - left()));
    std::memset(buffer_ + size, kFill, size_t(right() - buffer_ - size));
    return buffer_;
  }

  bool surroundings_intact() const {
    for (const char* p = left(); p < right(); ++p) {
      if ((p < buffer_ || p >= buffer_ + size_) && *p != kFill) return false;
    }
    return true;
  }

 private:
  static constexpr char kFill = 0x5a;
  char* left() const { return buffer_ - begin_ < 128 ? begin_ : buffer_ - 128; }
  char* right() const {
    char* const behind = buffer_ + size_;
    return begin_ + room_ - behind < 128 ? begin_ + room_ : behind + 128;
  }
  char *begin_, *buffer_;
  size_t room_, size_;
};

constexpr size_t kLargest = 16384 + 7;
constexpr uint32_t kMostTasks = 70;

Guarded& arena(size_t i) {
  static std::vector<Guarded> arenas;
  while (arenas.size() <= i) arenas.emplace_back(kLargest * 4);
  return arenas[i];
}

// Where the buffers of one run lie.
struct Placement {
  bool at_end;
  size_t gap, next = 0;
  char* buffer(size_t size) { return arena(next++).place(size, at_end, gap); }
  void* copy(const std::vector<char>& data) {
    char* const to = buffer(data.size());
    if (!data.empty()) std::memcpy(to, data.data(), data.size());
    return to;
  }
  bool intact() const {
    for (size_t i = 0; i < next; ++i) {
      if (!arena(i).surroundings_intact()) return false;
    }
    return true;
  }
};

enum Values { kUsual, kSpecial, kHuge, kTiny };

float value(Random& random, Values values) {
  static const float special[] = {
      0.0f, -0.0f, INFINITY, -INFINITY, NAN, -NAN, 1, -1,
      1e-45f, -1e-45f, 1e-39f, 0x1p-126f, 0x1p-133f,
      3.4028235e38f, -3.4028235e38f, 3.3895314e38f, 3.396e38f,
      65504.0f, 65519.996f, 65520.0f, -65520.0f,
      0x1p-24f, 0x1p-25f, 0x1.8p-24f, 0x1p-14f, 0x1.004p0f, 0x1.00cp0f, 0x1.01p0f, 0x1.03p0f};
  switch (values) {
    case kUsual: return random.normal() * 0.02f;
    case kHuge: return random.normal() * 1e38f;
    case kTiny: return float(int(random.below(41)) - 20) * 1e-45f;
    default: break;
  }
  const uint32_t kind = random.below(10);
  if (kind < 2) return special[random.below(sizeof special / sizeof *special)];
  if (kind < 4) return float_of(random.bits());
  return random.normal() * 0.02f;
}

std::vector<char> array_of(const std::vector<float>& values, DType dtype) {
  std::vector<char> array(values.size() * size_of(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t half = dtype == DType::F16 ? f32_to_f16(values[i]) : f32_to_bf16(values[i]);
    if (dtype == DType::F32) std::memcpy(&array[i * 4], &values[i], 4);
    else if (dtype == kSigns) array[i] = char(float_bits(values[i]) >> 3);
    else if (dtype == DType::I8) array[i] = char(int(float_bits(values[i]) % 255) - 127);
    else std::memcpy(&array[i * 2], &half, 2);
  }
  return array;
}

std::vector<float> random_values(Random& random, size_t n, Values values) {
  std::vector<float> v(n);
  for (float& x : v) x = value(random, values);
  return v;
}

bool same(double a, double b) { return std::memcmp(&a, &b, sizeof a) == 0 || (a != a && b != b); }

bool same(const Sums& a, const Sums& b) {
  for (uint32_t i = 0; i < kLanes; ++i) {
    if (!same(a.tau_sq[i], b.tau_sq[i]) || !same(a.dot[i], b.dot[i]) ||
        !same(a.approx_sq[i], b.approx_sq[i])) {
      return false;
    }
  }
  return true;
}

// What goes into an encode, and what comes out.
struct Input {
  size_t n;
  uint32_t tasks;
  DType base_dtype, shared_dtype;
  std::vector<DType> task_dtype;
  std::vector<char> base;
  std::vector<std::vector<char>> task;
  std::vector<float> threshold;
  MaskRule rule;
};

struct Output {
  std::vector<char> shared;
  std::vector<float> scales;
  std::vector<std::vector<char>> mask;
  std::vector<TaskStats> stats;
  std::vector<uint64_t> agreement;
  bool base_nonfinite;

  bool operator==(const Output& o) const {
    for (size_t k = 0; k < stats.size(); ++k) {
      if (!same(stats[k].sums, o.stats[k].sums) || stats[k].set_bits != o.stats[k].set_bits ||
          stats[k].published_bits != o.stats[k].published_bits ||
          stats[k].nonfinite != o.stats[k].nonfinite) {
        return false;
      }
    }
    return shared == o.shared && mask == o.mask && agreement == o.agreement &&
           base_nonfinite == o.base_nonfinite && scales.size() == o.scales.size() &&
           (scales.empty() || std::memcmp(scales.data(), o.scales.data(), scales.size() * 4) == 0);
  }
};

Input random_input(Random& random, size_t n, uint32_t tasks, DType base, DType task, DType shared,
                   bool mixed, Values values) {
  static const float thresholds[] = {0, 0.4f, 1, 0.2f, INFINITY, 0.6f, NAN};
  static const MaskRule rules[] = {MaskRule::Published, MaskRule::Magnitude, MaskRule::Adapted};
  Input in{n, tasks, base, shared, {}, {}, {}, {}, rules[random.below(3)]};
  const std::vector<float> b = random_values(random, n, values);
  in.base = array_of(b, base);
  for (uint32_t k = 0; k < tasks; ++k) {
    static const DType all[] = {DType::F32, DType::F16, DType::BF16};
    in.task_dtype.push_back(mixed ? all[random.below(3)] : task);
    std::vector<float> t = b;
    const uint32_t unchanged = random.below(4);
    for (float& x : t) {
      if (random.below(4) >= unchanged) x = values == kUsual ? x + random.normal() * 1e-3f
                                                             : value(random, values);
    }
    in.task.push_back(array_of(t, in.task_dtype[k]));
    in.threshold.push_back(thresholds[random.below(random.below(4) ? 3 : 7)]);
  }
  return in;
}

// Encodes in pieces of at most `piece` elements.
Output encode(const Kernels& kernels, const Input& in, Placement place, size_t piece = SIZE_MAX) {
  Output out{};
  const size_t mask_bytes = (in.n + 7) / 8, blocks = (in.n + kScaleBlock - 1) / kScaleBlock;
  const bool int8 = in.shared_dtype == DType::I8;
  const char* const base = static_cast<char*>(place.copy(in.base));
  char* const shared = place.buffer(in.n * size_of(in.shared_dtype));
  float* const scales = int8 ? reinterpret_cast<float*>(place.buffer(blocks * 4)) : nullptr;
  std::vector<const char*> task;
  std::vector<char*> mask;
  for (const std::vector<char>& t : in.task) {
    task.push_back(static_cast<char*>(place.copy(t)));
    mask.push_back(place.buffer(mask_bytes));
  }
  out.stats.resize(in.tasks, TaskStats{});
  out.agreement.resize(in.tasks + 1);

  size_t first = 0;
  do {
    std::vector<const void*> task_here;
    std::vector<uint8_t*> mask_here;
    for (uint32_t k = 0; k < in.tasks; ++k) {
      task_here.push_back(task[k] + first * size_of(in.task_dtype[k]));
      mask_here.push_back(reinterpret_cast<uint8_t*>(mask[k] + first / 8));
    }
    EncodeBlock e{};
    e.n = in.n - first < piece ? in.n - first : piece;
    e.tasks = in.tasks;
    e.base = base + first * size_of(in.base_dtype);
    e.base_dtype = in.base_dtype;
    e.task = task_here.data();
    e.task_dtype = in.task_dtype.data();
    e.rule = in.rule;
    e.threshold = in.threshold.data();
    e.shared = shared + first * size_of(in.shared_dtype);
    e.shared_dtype = in.shared_dtype;
    // Not scales + ..: at the end of a misaligned buffer that is undefined for floats.
    e.shared_scales = int8 ? reinterpret_cast<float*>(uintptr_t(scales) + first / kScaleBlock * 4)
                           : nullptr;
    e.mask = mask_here.data();
    e.stats = out.stats.data();
    e.agreement = out.agreement.data();
    kernels.encode(e);
    out.base_nonfinite |= e.base_nonfinite;
    first += e.n;
  } while (first < in.n);

  check(place.intact(), "%s encode wrote outside a buffer, n=%zu", kernels.name, in.n);
  out.shared.assign(shared, shared + in.n * size_of(in.shared_dtype));
  if (int8 && blocks) {
    out.scales.resize(blocks);
    std::memcpy(out.scales.data(), static_cast<void*>(scales), blocks * 4);
  }
  for (char* m : mask) out.mask.emplace_back(m, m + mask_bytes);
  return out;
}

void compare_encode(const Input& in, Random& random) {
  const Output expected = encode(kernels_scalar, in, {true, 0});
  for (const Kernels* const* k = available_kernels(); *k; ++k) {
    const Placement place{random.below(2) == 0, random.below(5)};
    check(encode(**k, in, place) == expected, "%s encode n=%zu tasks=%u base=%d task=%d shared=%d",
          (*k)->name, in.n, in.tasks, int(in.base_dtype),
          in.tasks ? int(in.task_dtype[0]) : 0, int(in.shared_dtype));
    if (in.n > kScaleBlock) {
      const size_t piece = (1 + random.below(6)) * kScaleBlock;
      check(encode(**k, in, place, piece) == expected, "%s encode in pieces of %zu, n=%zu",
            (*k)->name, piece, in.n);
    }
  }
}

const DType kFloats[] = {DType::F32, DType::F16, DType::BF16};
const DType kShared[] = {DType::F32, DType::F16, DType::BF16, DType::I8};
const DType kStored[] = {DType::F32, DType::F16, DType::BF16, DType::I8, kSigns};
const Values kValues[] = {kUsual, kSpecial, kHuge, kTiny};

void test_encode() {
  Random random(1);
  static const uint32_t task_counts[] = {0, 1, 2, 3, 8, 9, 33};
  for (size_t n = 0; n <= 530; ++n) {
    for (int i = 0; i < 4; ++i) {
      compare_encode(random_input(random, n, task_counts[random.below(7)], kFloats[random.below(3)],
                                  kFloats[random.below(3)], kShared[random.below(4)],
                                  random.below(4) == 0, kValues[i]),
                     random);
    }
  }
  for (DType base : kFloats) {
    for (DType task : kFloats) {
      for (DType shared : kShared) {
        for (uint32_t tasks : task_counts) {
          for (size_t n : {129, 512, 1543}) {
            const Values values = kValues[random.below(4)];
            compare_encode(random_input(random, n, tasks, base, task, shared, false, values),
                           random);
          }
        }
        compare_encode(random_input(random, kLargest, 8, base, task, shared, false, kUsual),
                       random);
      }
    }
  }
  compare_encode(random_input(random, 1000, kMostTasks, DType::F32, DType::F32, DType::F32, true,
                              kUsual),
                 random);
}

// A decode, or the sums of a stored mask, of elements first .. first + n.
struct Stored {
  size_t n, first;
  DType base_dtype, shared_dtype, other_dtype;  // other: out, or the task
  std::vector<char> base, shared, scales, mask, task;
  float scale;
  bool masked;
};

Stored random_stored(Random& random, size_t n, DType base, DType shared, DType other,
                     Values values) {
  static const float gains[] = {1, 0.7f, -2, 0, 1e38f, 1e-40f};
  Stored s{n, random.below(128), base, shared, other, {}, {}, {}, {}, {}, 0, random.below(8) != 0};
  const size_t total = s.first + n;
  s.base = array_of(random_values(random, n, values), base);
  s.task = array_of(random_values(random, n, values), other);
  // What encode stores is finite; NaNs of two operands may come out with either's payload.
  std::vector<float> finite = random_values(random, n, values);
  for (float& x : finite) x = is_finite(x) ? clamp_to(x, 60000) : 0;
  if (shared == kSigns) finite.resize((total + 7) / 8);
  s.shared = array_of(finite, shared);
  if (shared == DType::I8) {
    s.scales = array_of(random_values(random, (total + 127) / 128, kUsual), DType::F32);
  }
  for (size_t i = 0; i < (total + 7) / 8; ++i) s.mask.push_back(char(random.bits()));
  s.scale = gains[random.below(6)];
  return s;
}

DecodeBlock block_of(const Stored& s, Placement& place) {
  DecodeBlock d{};
  d.n = s.n;
  d.phase = uint32_t(s.first);
  d.base = place.copy(s.base);
  d.base_dtype = s.base_dtype;
  d.shared_dtype = s.shared_dtype;
  d.scale = s.scale;
  d.out_dtype = s.other_dtype;
  if (!s.masked) return d;
  d.shared = place.copy(s.shared);
  d.shared_scales = static_cast<float*>(place.copy(s.scales));
  d.mask = static_cast<uint8_t*>(place.copy(s.mask));
  return d;
}

// Of a base's signalling NaN where no bit is set a compiler may make a quiet one (clang takes b for b + (m ? x : -0)),
// so all are made quiet here; no encoder gives such a tensor a mask.
void make_quiet(std::vector<char>& decoded, const Stored& s) {
  for (size_t i = 0; s.other_dtype == DType::F32 && i < s.n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &decoded[i * 4], sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) bits |= 0x400000;
    std::memcpy(&decoded[i * 4], &bits, sizeof bits);
  }
}

std::vector<char> decode(const Kernels& kernels, const Stored& s, Placement place) {
  DecodeBlock d = block_of(s, place);
  char* const out = place.buffer(s.n * size_of(s.other_dtype));
  d.out = out;
  kernels.decode(d);
  check(place.intact(), "%s decode wrote outside a buffer, n=%zu", kernels.name, s.n);
  std::vector<char> decoded(out, out + s.n * size_of(s.other_dtype));
  make_quiet(decoded, s);
  return decoded;
}

Sums sums(const Kernels& kernels, const Stored& s, Placement place) {
  const DecodeBlock d = block_of(s, place);
  Sums to{};
  kernels.sums(d, place.copy(s.task), s.other_dtype, to);
  return to;
}

// Bytes from an address that every vector divides: stores differ by how many of 64 and of 16 it is.
constexpr size_t kGaps[] = {0, 0, 1, 2, 3, 4, 16, 32};

void compare_stored(const Stored& s, Random& random) {
  const std::vector<char> expected = decode(kernels_scalar, s, {true, 0});
  const Sums expected_sums = sums(kernels_scalar, s, {true, 0});
  for (const Kernels* const* k = available_kernels(); *k; ++k) {
    const Placement place{random.below(2) == 0, kGaps[random.below(8)]};
    check(decode(**k, s, place) == expected, "%s decode n=%zu first=%zu base=%d shared=%d out=%d",
          (*k)->name, s.n, s.first, int(s.base_dtype), int(s.shared_dtype), int(s.other_dtype));
    check(same(sums(**k, s, place), expected_sums), "%s sums n=%zu first=%zu base=%d shared=%d",
          (*k)->name, s.n, s.first, int(s.base_dtype), int(s.shared_dtype));
  }
}

void test_decode_and_sums() {
  Random random(2);
  for (size_t n = 0; n <= 530; ++n) {
    for (Values values : kValues) {
      compare_stored(random_stored(random, n, kFloats[random.below(3)], kStored[random.below(5)],
                                   kFloats[random.below(3)], values),
                     random);
    }
  }
  for (DType base : kFloats) {
    for (DType shared : kStored) {
      for (DType other : kFloats) {
        for (size_t n : {300, 1543, int(kLargest - 128)}) {
          compare_stored(random_stored(random, n, base, shared, other, kSpecial), random);
        }
      }
    }
  }
}

// What decoding whole checksum blocks gives: their elements, then the blocks' hashes.
std::vector<char> decode_hashed(const Kernels& kernels, const Stored& s, size_t gap) {
  const auto moved = [&](std::vector<char> bytes) {
    bytes.insert(bytes.begin(), gap, 0);
    return bytes;
  };
  const std::vector<char> base = moved(s.base), shared = moved(s.shared), scales = moved(s.scales), mask = moved(s.mask);
  const size_t out_size = s.n * size_of(s.other_dtype);
  std::vector<char> room(out_size + gap + 64);
  char* const out = room.data() + (64 - reinterpret_cast<uintptr_t>(room.data()) % 64) % 64 + gap;
  const size_t base_blocks = s.base.size() / kSumBlock;
  const size_t shared_blocks = s.masked && s.shared_dtype != kSigns ? s.shared.size() / kSumBlock : 0;
  std::vector<uint64_t> of_base(base_blocks + 1, 7), of_shared(shared_blocks + 1, 7);
  DecodeBlock d{};
  d.n = s.n;
  d.base = base.data() + gap;
  d.base_dtype = s.base_dtype;
  d.shared_dtype = s.shared_dtype;
  d.scale = s.scale;
  d.out_dtype = s.other_dtype;
  d.out = out;
  if (s.masked) {
    d.shared = shared.data() + gap;
    d.shared_scales = reinterpret_cast<const float*>(scales.data() + gap);
    d.mask = reinterpret_cast<const uint8_t*>(mask.data() + gap);
  }
  kernels.decode_hashed(d, of_base.data(), of_shared.data());
  check(of_base[base_blocks] == 7 && of_shared[shared_blocks] == 7, "%s gives more hashes than blocks", kernels.name);
  std::vector<char> found(out, out + out_size);
  make_quiet(found, s);
  for (const auto& hashes : {of_base, of_shared}) {
    const char* const bytes = reinterpret_cast<const char*>(hashes.data());
    found.insert(found.end(), bytes, bytes + hashes.size() * sizeof(uint64_t));
  }
  return found;
}

void test_decode_hashed() {
  Random random(11);
  for (DType base : kFloats) {
    for (DType shared : kStored) {
      for (bool masked : {true, false}) {
        Stored s = random_stored(random, kSumBlock, base, shared, kFloats[random.below(3)], kSpecial);
        s.first = 0;
        s.masked = masked;
        const std::vector<char> expected = decode_hashed(kernels_scalar, s, 0);
        const uint64_t first = kernels_scalar.hash(s.base.data(), kSumBlock);
        check(std::memcmp(&expected[s.n * size_of(s.other_dtype)], &first, sizeof first) == 0, "hash of a block");
        for (const Kernels* const* k = available_kernels(); *k; ++k) {
          check(decode_hashed(**k, s, kGaps[random.below(8)]) == expected, "%s decode_hashed base=%d shared=%d masked=%d",
                (*k)->name, int(base), int(shared), int(masked));
        }
      }
    }
  }
}

// What the counting kernels say of some masks, and of a shared vector.
struct Counted {
  std::vector<uint64_t> agreement, overlap;
  std::vector<std::vector<uint8_t>> consensus;  // for 1 task, 2 tasks, …, one more than there are
  bool operator==(const Counted& o) const {
    return agreement == o.agreement && overlap == o.overlap && consensus == o.consensus;
  }
};

Counted count(const Kernels& kernels, const std::vector<std::vector<char>>& masks, size_t n,
              Placement place) {
  std::vector<const uint8_t*> planes;
  for (const auto& mask : masks) planes.push_back(static_cast<uint8_t*>(place.copy(mask)));
  const MaskBlock block{n, uint32_t(masks.size()), planes.data()};
  Counted c;
  c.agreement.resize(masks.size() + 1, 1000);  // they add to what is there
  c.overlap.resize(masks.size() * masks.size(), 1000);
  kernels.agreement(block, c.agreement.data());
  kernels.overlap(block, c.overlap.data());
  for (uint32_t least = 1; least <= masks.size() + 1; least = least < 3 ? least + 1 : 2 * least) {
    uint8_t* const out = reinterpret_cast<uint8_t*>(place.buffer((n + 7) / 8));
    kernels.consensus(block, least, out);
    c.consensus.emplace_back(out, out + (n + 7) / 8);
  }
  check(place.intact(), "%s counting wrote outside a buffer, n=%zu", kernels.name, n);
  return c;
}

void compare_counts(Random& random, size_t n, uint32_t tasks) {
  std::vector<std::vector<char>> masks(tasks, std::vector<char>((n + 7) / 8));
  for (auto& mask : masks) {
    const uint32_t dense = random.below(4);  // spare bits are set, too: they do not count
    for (char& c : mask) c = char(random.bits() | (dense ? random.bits() : 0));
  }
  const Counted expected = count(kernels_scalar, masks, n, {true, 0});
  uint64_t total = 0;
  for (uint64_t elements : expected.agreement) total += elements - 1000;
  check(total == n, "every element is counted once, n=%zu tasks=%u", n, tasks);
  for (const Kernels* const* k = available_kernels(); *k; ++k) {
    const Placement place{random.below(2) == 0, random.below(5)};
    check(count(**k, masks, n, place) == expected, "%s counts n=%zu tasks=%u", (*k)->name, n, tasks);
  }
}

void test_counting() {
  Random random(5);
  for (uint32_t tasks : {1, 2, 3, 4, 7, 8, 9, 15, 16, 20, 31, 32, 33, 63, 64, 70}) {
    for (size_t n : {0, 1, 7, 8, 9, 255, 256, 511, 513, 4095, 4096, 4097, 8191, 8192, 8193, 12345}) {
      compare_counts(random, n, tasks);
    }
  }
  for (size_t n = 0; n < 530; ++n) compare_counts(random, n, 1 + random.below(10));
}

void test_zeros() {
  Random random(6);
  for (DType dtype : kShared) {
    for (size_t n : {0, 1, 15, 127, 128, 129, 300, 4000}) {
      std::vector<float> values = random_values(random, n, n % 2 ? kSpecial : kTiny);
      for (float& x : values) {
        if (random.below(4) == 0) x = random.below(2) ? 0.0f : -0.0f;
      }
      std::vector<char> shared = array_of(values, dtype);
      std::vector<float> scales = random_values(random, (n + 127) / 128, kTiny);
      if (!scales.empty()) scales[random.below(uint32_t(scales.size()))] = 0;
      uint64_t expected = 0;
      for (size_t i = 0; i < n; ++i) {
        uint16_t half;
        if (dtype == DType::F32) {
          float x;
          std::memcpy(&x, &shared[i * 4], 4);
          expected += x == 0;
        } else if (dtype == DType::I8) {
          expected += shared[i] == 0 || scales[i / 128] == 0;
        } else {
          std::memcpy(&half, &shared[i * 2], 2);
          expected += (half & 0x7fff) == 0;
        }
      }
      for (const Kernels* const* k = available_kernels(); *k; ++k) {
        Placement place{random.below(2) == 0, random.below(5)};
        const void* const from = place.copy(shared);
        const auto* const scale =
            static_cast<const float*>(place.copy(array_of(scales, DType::F32)));
        check((*k)->zeros(from, dtype, scale, n) == expected, "%s zeros of type %d, n=%zu",
              (*k)->name, int(dtype), n);
      }
    }
  }
}

void test_hash() {
  Random random(3);
  std::vector<char> data;
  for (int i = 0; i < 4096 + 64; ++i) data.push_back(char(random.bits()));
  for (size_t size = 0; size <= 4096; size += 64) {
    const std::vector<char> input(data.begin(), data.begin() + long(size));
    const uint64_t expected = kernels_scalar.hash(input.data(), size);
    for (const Kernels* const* k = available_kernels(); *k; ++k) {
      Placement place{random.below(2) == 0, random.below(5)};
      check((*k)->hash(place.copy(input), size) == expected, "%s hash of %zu", (*k)->name, size);
    }
  }
  // As the reference implementation has them: 256 and 2048 zero bytes.
  const std::vector<char> zeros(2048);
  check(kernels_scalar.hash(nullptr, 0) == kernels_scalar.hash(zeros.data(), 256), "hash of 0");
  check(kernels_scalar.hash(zeros.data(), 256) == 0xa68dfbb1d75c6e8d, "hash of 256 zeros");
  check(kernels_scalar.hash(zeros.data(), 2048) == 0x211d551610b7f84a, "hash of 2048 zeros");
}

// The value of a 16-bit float, in plain arithmetic.
double value_of(uint32_t bits, int exponent_bits) {
  const int fraction_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = int(bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const int fraction = int(bits & ((1u << fraction_bits) - 1));
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return fraction ? double(NAN) : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
  return sign * std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
}

template <typename ToFloat, typename ToHalf>
void test_conversion(const char* name, int exponent_bits, ToFloat to_float, ToHalf to_half) {
  const uint32_t infinity = ((1u << exponent_bits) - 1) << (15 - exponent_bits);
  for (uint32_t h = 0; h <= 0xffff; ++h) {
    const float x = to_float(uint16_t(h));
    const bool nan = (h & 0x7fff) > infinity;
    const bool quiet = nan && (h >> (14 - exponent_bits) & 1);
    check(same(x, value_of(h, exponent_bits)), "%s %04x to float", name, h);
    check(std::signbit(x) == (h >> 15 != 0), "%s %04x: sign", name, h);
    const uint32_t back = nan && !quiet ? h | 1u << (14 - exponent_bits) : h;
    check(to_half(x) == back, "%s %04x to float and back", name, h);
  }
  // Between two neighbours, the last of them infinity, as far above the largest as its predecessor
  // is below it: the middle goes to the even one, everything else to the nearer one.
  for (uint32_t h = 0; h < infinity; ++h) {
    const double low = value_of(h, exponent_bits);
    const double high = h + 1 < infinity ? value_of(h + 1, exponent_bits)
                                         : 2 * low - value_of(h - 1, exponent_bits);
    const float middle = float((low + high) / 2);
    for (int sign = 0; sign < 2; ++sign) {
      const float s = sign ? -1.0f : 1.0f;
      const uint32_t bit = sign ? 0x8000 : 0;
      const auto rounds_to = [&](float x, uint32_t expected) {
        check(to_half(s * x) == (expected | bit), "%s of %a", name, double(s * x));
      };
      rounds_to(middle, h + (h & 1));
      rounds_to(std::nextafter(middle, 0.0f), h);
      rounds_to(std::nextafter(middle, INFINITY), h + 1);
    }
  }
  check((to_half(NAN) & 0x7fff) > infinity, "%s of NaN", name);
  check((to_half(float_of(0x7f800001)) & 0x7fff) > infinity, "%s of a NaN with low payload", name);
}

// The vector variants' conversions, through a decode without a mask.
void test_conversions_of_variants() {
  std::vector<char> all_halves, floats;
  for (uint32_t h = 0; h <= 0xffff; ++h) {
    const uint16_t half = uint16_t(h);
    all_halves.insert(all_halves.end(), reinterpret_cast<const char*>(&half),
                      reinterpret_cast<const char*>(&half) + 2);
    // The middles between two values of either type, and what lies next to them.
    for (uint32_t low : {0x0u, 0x1u, 0xfffu, 0x1000u, 0x1001u, 0x2fffu, 0x3000u, 0x7fffu, 0x8000u,
                         0x8001u}) {
      const uint32_t bits = h << 16 | low;
      floats.insert(floats.end(), reinterpret_cast<const char*>(&bits),
                    reinterpret_cast<const char*>(&bits) + 4);
    }
  }
  const auto converted = [](const Kernels& k, const std::vector<char>& in, DType from, DType to) {
    DecodeBlock d{};
    d.n = in.size() / size_of(from);
    d.base = in.data();
    d.base_dtype = from;
    d.out_dtype = to;
    std::vector<char> out(d.n * size_of(to));
    d.out = out.data();
    k.decode(d);
    return out;
  };
  for (const Kernels* const* k = available_kernels(); *k; ++k) {
    for (DType from : kFloats) {
      for (DType to : kFloats) {
        const std::vector<char>& in = from == DType::F32 ? floats : all_halves;
        check(converted(**k, in, from, to) == converted(kernels_scalar, in, from, to),
              "%s converts %d to %d", (*k)->name, int(from), int(to));
      }
    }
  }
}

// The smallest denormals add up like any other numbers.
void test_denormals() {
  const float smallest = 0x1p-149f;
  Input in{1000, 2, DType::F32, DType::F32, {DType::F32, DType::F32}, {}, {}, {0.4f, 0.4f},
           MaskRule::Published};
  in.base = array_of(std::vector<float>(in.n, smallest), DType::F32);
  in.task.assign(2, array_of(std::vector<float>(in.n, 2 * smallest), DType::F32));
  const std::vector<char> twice = in.task[0];
  for (const Kernels* const* k = available_kernels(); *k; ++k) {
    const Output out = encode(**k, in, {true, 0});
    check(out.shared == twice && out.stats[0].set_bits == in.n, "%s encode flushes denormals",
          (*k)->name);
    Stored stored{};
    stored.n = in.n;
    stored.base_dtype = stored.shared_dtype = stored.other_dtype = DType::F32;
    stored.base = stored.shared = in.base;
    stored.mask.assign(in.n / 8, char(0xff));
    stored.scale = 1;
    stored.masked = true;
    check(decode(**k, stored, {true, 0}) == twice, "%s decode flushes denormals", (*k)->name);
  }
}

#if defined(__SSE2__)
// Flush-to-zero, denormals-are-zero, rounding up: a kernel neither obeys nor changes them.
void test_float_environment() {
  constexpr unsigned strange = 0x1f80 | 0x8040 | 0x4000;
  Random random(4);
  for (Values values : {kTiny, kUsual}) {
    for (DType dtype : kFloats) {
      const Input in = random_input(random, 700, 3, dtype, dtype, dtype, false, values);
      const Stored stored = random_stored(random, 700, dtype, dtype, dtype, values);
      for (const Kernels* const* k = available_kernels(); *k; ++k) {
        const Output encoded = encode(**k, in, {true, 0});
        const std::vector<char> decoded = decode(**k, stored, {true, 0});
        const Sums summed = sums(**k, stored, {true, 0});
        const unsigned found = _mm_getcsr();
        _mm_setcsr(strange);
        const bool encode_same = encode(**k, in, {true, 0}) == encoded;
        const unsigned after_encode = _mm_getcsr();
        const bool decode_same = decode(**k, stored, {true, 0}) == decoded;
        const unsigned after_decode = _mm_getcsr();
        const Sums again = sums(**k, stored, {true, 0});
        const unsigned after_sums = _mm_getcsr();
        _mm_setcsr(found);
        check(encode_same && decode_same && same(again, summed), "%s obeys MXCSR", (*k)->name);
        check(after_encode == strange && after_decode == strange && after_sums == strange,
              "%s changes MXCSR", (*k)->name);
      }
    }
  }
}
#else
void test_float_environment() {}
#endif

void test_dispatch() {
  check(find_kernels("scalar") == &kernels_scalar, "scalar is always there");
  check(find_kernels("no-such") == nullptr, "an unknown name gives null");
  setenv("TALLCODEC_KERNELS", "scalar", 1);
  check(find_kernels() == &kernels_scalar, "the environment forces a variant");
  setenv("TALLCODEC_KERNELS", "no-such", 1);
  check(find_kernels() == nullptr, "the environment names what is not there");
  setenv("TALLCODEC_KERNELS", "", 1);
  check(find_kernels() == available_kernels()[0], "empty is unset");
  unsetenv("TALLCODEC_KERNELS");
  check(find_kernels() == available_kernels()[0], "the best by default");
}

}  // namespace

int main() {
  test_dispatch();
  test_conversion("float16", 5, f16_to_f32, f32_to_f16);
  test_conversion("bfloat16", 8, bf16_to_f32, f32_to_bf16);
  test_conversions_of_variants();
  test_hash();
  test_counting();
  test_zeros();
  test_encode();
  test_decode_and_sums();
  test_decode_hashed();
  test_denormals();
  test_float_environment();
  for (const Kernels* const* k = available_kernels(); *k; ++k) std::printf("%s ", (*k)->name);
  std::printf("kernels: %d passed, %d failed\n", passed, failed);
  return failed != 0;
}
