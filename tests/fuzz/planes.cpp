// The decoders of planes. Coded ones: any bytes, and bytes put together so that they get far, by the CPU's decoders
// and by the GPU's, which must refuse the same and agree on the rest; and whatever is coded comes back. Raw ones,
// int8 shared vectors, scales per row: a file made around any values decodes to what the formula says.
#include "planes.h"

#include <cmath>

#include "float_environment.h"
#include "format.h"
#include "mask_math.h"

using namespace tallcodec;

namespace {

using Bytes = std::vector<uint8_t>;

constexpr uint64_t bytes_of(uint64_t n) { return (n + 7) / 8; }

// Mostly a few elements, sometimes more than a block.
uint64_t elements(Input& in, uint64_t block) {
  const uint32_t kind = in.below(64);
  return kind == 63 ? block + in.take<uint16_t>() % 3000 : 1 + in.take<uint16_t>() % (kind < 48 ? 600 : 9000);
}

template <class Body>
bool sound(Body body) {
  try {
    body();
    return true;
  } catch (const Error& e) {
    EXPECT(e.status == Status::Format);
    return false;
  }
}

TernaryBits decode_ternary(const Buffer& plane, uint64_t n) {
  const Buffer mask(bytes_of(n)), signs(bytes_of(n));
  const bool ok = sound([&] {
    const TernaryPlane decoder(plane.data(), plane.size(), n);
    for (uint64_t b = decoder.blocks().count(); b-- > 0;) {
      const auto [block, size] = decoder.blocks().block(b);
      const uint64_t at = b * kTernaryBlock / 8, end = std::min(mask.size(), at + kTernaryBlock / 8);
      const Buffer block_mask(end - at), block_signs(end - at);
      decoder.decode(block, size, b, block_mask.data(), block_signs.data());
      std::memcpy(mask.data() + at, block_mask.data(), end - at);
      std::memcpy(signs.data() + at, block_signs.data(), end - at);
    }
  });
  return {ok, {mask.data(), mask.data() + mask.size()}, {signs.data(), signs.data() + signs.size()}};
}

// The slots that a plane's table makes, as a GPU's host makes them of a table that is sound.
TernaryBits decode_ternary_on_gpu(const Buffer& plane, uint64_t n) {
  const uint64_t table = 8 * ((n + kTernaryBlock - 1) / kTernaryBlock);
  uint64_t head = 0;
  if (!sound([&] { head = TernaryPlane(plane.data(), plane.size(), n).blocks().head(); })) return {false, {}, {}};
  std::vector<uint64_t> slots;
  uint64_t bit = (table + 9) * 8;
  for (uint32_t s = 0; s < kGapSymbols; ++s) {
    if (!(plane.data()[table + s / 8] >> s % 8 & 1)) continue;
    uint64_t frequency = 1;
    for (uint32_t b = 0; b < kTernarySlotBits; ++b, ++bit) frequency += uint64_t(plane.data()[bit / 8] >> bit % 8 & 1) << b;
    const uint64_t gap = ((4 + s % 4) << s / 4) - 4;
    for (uint64_t i = 0; i < frequency; ++i) slots.push_back(frequency | i << 16 | gap << 32 | uint64_t{s / 4} << 59);
  }
  slots.resize(1 << kTernarySlotBits);
  int32_t status = 0;
  const Buffer mask(bytes_of(n)), signs(bytes_of(n));
  kernels_cuda_host.unpack_ternary({}, {{plane.data(), plane.size(), n, &status}, head, slots.data(), mask.data(), signs.data()});
  return {!status, {mask.data(), mask.data() + mask.size()}, {signs.data(), signs.data() + signs.size()}};
}

TernaryBits ternary(const Bytes& bytes, uint64_t n) {
  const Buffer plane(bytes);
  const TernaryBits bits = decode_ternary(plane, n);
  EXPECT(decode_ternary_on_gpu(plane, n) == bits);
  if (!bits.sound) return bits;
  for (uint64_t i = 0; i < bits.mask.size(); ++i) EXPECT(!(bits.signs[i] & ~bits.mask[i]));
  if (n % 8) EXPECT(bits.mask.back() >> n % 8 == 0);
  return bits;
}

template <class T>
void put(Bytes& to, T value) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(&value);
  to.insert(to.end(), bytes, bytes + sizeof value);
}

// A plane of one block whose table is right, and whose counts and states are possible.
Bytes ternary_of_parts(Input& in, uint64_t n) {
  Bytes bitmap = in.bytes(9), plane, values;
  bitmap[8] &= 15;
  uint32_t symbols = 0, left = 1 << kTernarySlotBits, held = 0, filled = 0;
  for (uint8_t byte : bitmap) symbols += uint32_t(__builtin_popcount(byte));
  if (!symbols) bitmap[0] = 1, symbols = 1;
  for (uint32_t s = 0; s < symbols; ++s) {
    const uint32_t most = left - (symbols - 1 - s);
    const uint32_t frequency = s + 1 == symbols ? left : 1 + in.take<uint16_t>() % most;
    left -= frequency;
    held |= (frequency - 1) << filled;
    for (filled += kTernarySlotBits; filled >= 8; filled -= 8, held >>= 8) values.push_back(uint8_t(held));
  }
  if (filled) values.push_back(uint8_t(held));
  Bytes block;
  const uint32_t count = 1 + in.take<uint16_t>() % uint32_t(std::min<uint64_t>(n, 4000));
  const uint32_t words = in.take<uint16_t>() % 300, extras = in.take<uint16_t>() % 300;
  put(block, count);
  put(block, words);
  for (int k = 0; k < 2; ++k) put(block, in.below(4) ? kLeast + in.take<uint32_t>() % 0xffff0000u : kLeast);
  for (uint8_t byte : in.bytes(2 * words + extras + (count + 7) / 8)) block.push_back(byte);
  for (uint64_t b = 0; b < (n + kTernaryBlock - 1) / kTernaryBlock; ++b) put(plane, uint64_t{block.size()});
  for (const Bytes* part : {&bitmap, &values, &block}) plane.insert(plane.end(), part->begin(), part->end());
  return plane;
}

// Bits in runs: an eighth of the bytes of `in`, or all.
Bytes random_bits(Input& in, uint64_t n) {
  const uint32_t kind = in.below(4);
  Bytes bits = in.bytes(bytes_of(n));
  for (uint64_t i = 0; i < bits.size(); ++i) {
    if (kind == 1) bits[i] &= uint8_t(bits[i] << 1 & bits[i] >> 2);
    if (kind == 2 && i / 37 % 5) bits[i] = 0;
    if (kind == 3 && i % 251) bits[i] = 0;
  }
  if (n % 8) bits.back() &= uint8_t((1 << n % 8) - 1);
  return bits;
}

void ternary_plane(Input& in, uint64_t n) {
  const Bytes mask = random_bits(in, n);
  Bytes signs = in.bytes(mask.size());
  for (uint64_t i = 0; i < signs.size(); ++i) signs[i] &= mask[i];
  const std::string coded = code_ternary(mask, signs, n);
  EXPECT((ternary(Bytes(coded.begin(), coded.end()), n) == TernaryBits{true, mask, signs}));
}

// A shared vector of any bits; of each type those of the scales, too.
struct Shared {
  Buffer values, scales;
  DType dtype;

  Shared(Input& in, uint64_t n)
      : values(0), scales(in.bytes((n + kScaleBlock - 1) / kScaleBlock * 4)), dtype(in.one_of(kShared)) {
    const bool wild = in.below(2);
    const uint32_t size = size_of(dtype);
    Bytes raw = in.bytes(n * size);
    for (uint64_t i = 0; !wild && i < n; ++i) {  // of usual sizes, or 0
      if (dtype != DType::I8) raw[(i + 1) * size - 1] = uint8_t((raw[(i + 1) * size - 1] & 0x83) | 0x38);
      if (raw[i * size] % 3 == 0) std::fill(&raw[i * size], &raw[i * size] + size, uint8_t{0});
    }
    values = Buffer(raw);
    for (uint64_t b = 0; !wild && b < scales.size() / 4; ++b) scales.as<float>()[b] = std::ldexp(1.0f, int(b % 9) - 4);
  }
  const float* scales_here() const { return dtype == DType::I8 ? scales.as<float>() : nullptr; }
  SharedBlock block(uint64_t first) const {
    return {values.data() + first * size_of(dtype), dtype, scales_here() ? scales_here() + first / kScaleBlock : nullptr};
  }
  float at(uint64_t i) const {
    switch (dtype) {
      case DType::F32: return values.as<float>()[i];
      case DType::F16: return f16_to_f32(values.as<uint16_t>()[i]);
      case DType::BF16: return bf16_to_f32(values.as<uint16_t>()[i]);
      default: return dequantise(values.as<int8_t>()[i], scales.as<float>()[i / kScaleBlock]);
    }
  }
};

struct Mask {
  bool sound;
  Bytes bits;
  bool operator==(const Mask& o) const { return sound == o.sound && (!sound || bits == o.bits); }
};

Mask decode_mask_on_cpu(const Buffer& plane, const Shared& s, uint64_t n, const Kernels& kernels) {
  const uint64_t blocks = (n + kMaskBlock - 1) / kMaskBlock;
  Mask mask{false, Bytes(bytes_of(n))};
  mask.sound = sound([&] {
    require(plane.size() >= 8 * blocks, "it is too short");
    const CodedBlocks coded(plane.data(), plane.size(), blocks, 8 * blocks);
    for (uint64_t b = 0; b < blocks; ++b) {
      const auto [bytes, size] = coded.block(b);
      const uint64_t first = b * kMaskBlock, count = std::min(kMaskBlock, n - first);
      const Buffer bits(bytes_of(count));
      decode_mask(bytes, size, s.block(first), count, kernels, bits.data());
      std::memcpy(&mask.bits[first / 8], bits.data(), bits.size());
    }
  });
  return mask;
}

Mask mask(const Bytes& bytes, const Shared& s, uint64_t n) {
  const Buffer plane(bytes);
  const Mask expected = decode_mask_on_cpu(plane, s, n, kernels_scalar);
  for (auto k = available_kernels(); *k; ++k) EXPECT(decode_mask_on_cpu(plane, s, n, **k) == expected);
  if (plane.size() >= 8 * ((n + kMaskBlock - 1) / kMaskBlock)) {
    int32_t status = 0;
    const Buffer bits(bytes_of(n));
    kernels_cuda_host.unpack_mask(
        {}, {{plane.data(), plane.size(), n, &status}, s.values.data(), s.dtype, s.scales_here(), bits.data()});
    EXPECT((Mask{!status, Bytes(bits.data(), bits.data() + bits.size())} == expected));
  }
  if (expected.sound && n % 8) EXPECT(expected.bits.back() >> n % 8 == 0);
  return expected;
}

// One block, its counts and frequencies possible.
Bytes mask_of_parts(Input& in, uint64_t n) {
  const uint32_t first = 1 + in.take<uint16_t>() % (kMaskContexts - 1);
  const uint32_t used = in.take<uint16_t>() % (kMaskContexts - first + 1), words = in.take<uint16_t>() % 400;
  const uint32_t all = (1 << kMaskBits) + 1;
  Bytes block, plane;
  put(block, words);
  put(block, uint16_t(first));
  put(block, uint16_t(used));
  for (uint32_t i = 0; i < 2 + used; ++i) put(block, uint16_t(in.take<uint16_t>() % all));
  for (uint32_t i = 0; i < kMaskStates; ++i) put(block, in.below(4) ? kLeast + in.take<uint32_t>() % 0xffff0000u : kLeast);
  for (uint8_t byte : in.bytes(2 * words)) block.push_back(byte);
  for (uint64_t b = 0; b < (n + kMaskBlock - 1) / kMaskBlock; ++b) put(plane, uint64_t{block.size()});
  plane.insert(plane.end(), block.begin(), block.end());
  return plane;
}

// A mask that a writer could have: none where s is 0 or a NaN.
Bytes writable_mask(Input& in, const Shared& s, uint64_t n) {
  Bytes bits = random_bits(in, n);
  for (uint64_t i = 0; i < n; ++i) {
    const float value = s.at(i);
    if (value == 0 || value != value) bits[i / 8] &= uint8_t(~(1 << i % 8));
  }
  return bits;
}

Bytes code(const Bytes& bits, const Shared& s, uint64_t n) {
  std::string ends, blocks;
  for (uint64_t first = 0; first < n; first += kMaskBlock) {
    blocks += code_mask(&bits[first / 8], s.block(first), std::min(kMaskBlock, n - first));
    append(ends, uint64_t{blocks.size()});
  }
  ends += blocks;
  return {ends.begin(), ends.end()};
}

void mask_plane(Input& in, uint64_t n) {
  const Shared s(in, n);
  const Bytes bits = writable_mask(in, s, n);
  EXPECT((mask(code(bits, s, n), s, n) == Mask{true, bits}));
}

template <class T>
T at(const void* array, uint64_t i) {
  return static_cast<const T*>(array)[i];
}

float value(const Buffer& b, DType dtype, uint64_t i) {
  return dtype == DType::F32 ? at<float>(b.data(), i)
                             : dtype == DType::F16 ? f16_to_f32(at<uint16_t>(b.data(), i)) : bf16_to_f32(at<uint16_t>(b.data(), i));
}

bool same_or_nan(float a, float b) { return float_bits(a) == float_bits(b) || (a != a && b != b); }

// A file of one tensor and one task, its planes any values: what it decodes to is what the formula says.
void file(Input& in) {
  const uint64_t rows = 1 + in.below(40), length = 1 + in.below(in.below(8) ? 300 : 9000), n = rows * length;
  const DType base_dtype = in.one_of(kFloats), out_dtype = in.one_of(kFloats);
  const bool scales_per_row = in.below(2), coded = in.below(2), is_ternary = in.below(3) == 0;
  const float scale = scales_per_row && !is_ternary ? 1.0f : in.take<float>();
  if (is_ternary && !is_finite(scale)) return;
  const Shared s(in, n);
  const Bytes bits = writable_mask(in, s, n), row_scales = in.bytes(4 * rows);
  Bytes signs = in.bytes(bits.size());
  for (uint64_t i = 0; i < signs.size(); ++i) signs[i] &= bits[i];
  const Buffer base(in.bytes(n * size_of(base_dtype)));

  Index index;
  std::string planes;
  const auto add = [&](PlaneKind kind, PlaneCoding coding, const Bytes& bytes, uint64_t raw_size) {
    PlaneRecord p{};
    p.kind = kind;
    p.coding = coding;
    p.offset = sizeof(Header) + planes.size();
    p.size = bytes.size();
    p.raw_size = raw_size;
    p.first_sum = index.sums.size();
    planes.append(bytes.begin(), bytes.end());
    planes.resize(align64(planes.size()), '\0');
    for (uint64_t at = p.offset - sizeof(Header); at < planes.size(); at += kSumBlock) {
      index.sums.push_back(hash_block(kernels_scalar, reinterpret_cast<const uint8_t*>(planes.data()) + at,
                                      std::min(kSumBlock, planes.size() - at)));
    }
    index.planes.push_back(p);
    return uint32_t(index.planes.size() - 1);
  };
  const auto raw = [&](PlaneKind kind, const Bytes& bytes) { return add(kind, PlaneCoding::Raw, bytes, bytes.size()); };
  const auto copy = [](const Buffer& b) { return Bytes(b.data(), b.data() + b.size()); };

  TensorRecord t{};
  EntryRecord e{};
  TaskRecord task{};
  index.strings = "wt";
  index.dims = {rows, length};
  t.name = {0, 1};
  t.rank = 2;
  t.dtype = base_dtype;
  t.in_base = 1;
  t.shared_plane = t.shared_scales_plane = t.alias = e.scales_plane = kNone;
  t.base_plane = raw(PlaneKind::Base, copy(base));
  task.name = {1, 1};
  task.method = is_ternary ? Method::Ternary : Method::Tall;
  e.coding = is_ternary ? Coding::Ternary : Coding::Mask;
  e.dtype = out_dtype;
  e.rank = 2;
  e.scale = scale;
  for (uint8_t byte : bits) e.set_bits += uint64_t(__builtin_popcount(byte));
  e.published_bits = e.set_bits;
  if (is_ternary) {
    Bytes both = bits;
    both.insert(both.end(), signs.begin(), signs.end());
    const std::string gaps = code_ternary(bits, signs, n);
    e.plane = coded ? add(PlaneKind::Ternary, PlaneCoding::Gaps, {gaps.begin(), gaps.end()}, both.size())
                    : raw(PlaneKind::Ternary, both);
  } else {
    t.shared_dtype = s.dtype;
    t.shared_plane = raw(PlaneKind::Shared, copy(s.values));
    if (s.dtype == DType::I8) t.shared_scales_plane = raw(PlaneKind::Scales, copy(s.scales));
    e.plane = coded ? add(PlaneKind::Mask, PlaneCoding::Conditional, code(bits, s, n), bits.size())
                    : raw(PlaneKind::Mask, bits);
    if (scales_per_row) e.scales_plane = raw(PlaneKind::Scales, row_scales);
  }
  index.tensors = {t};
  index.tasks = {task};
  index.entries = {e};
  index.header.base_storage = BaseStorage::Embedded;
  const std::string packed = write_index(index);
  const uint64_t size = sizeof(Header) + planes.size() + packed.size();
  const Header header = write_header(sizeof(Header) + planes.size(), packed, size);
  std::string all(reinterpret_cast<const char*>(&header), sizeof header);
  all += planes + packed;
  const Buffer bytes(Bytes(all.begin(), all.end()));

  const File opened("fuzz.tall", size, [&](uint64_t offset, uint64_t) { return bytes.data() + offset; });
  EXPECT(opened.verify({}).empty());
  const uint64_t first = in.take<uint32_t>() % n, count = 1 + in.take<uint32_t>() % (n - first);
  const Buffer out(n * size_of(out_dtype)), part(count * size_of(out_dtype));
  for (auto k = available_kernels(); *k; ++k) {
    Options options;
    options.kernels = *k;
    opened.decode({{0, 0, out.data()}, {0, 0, part.data(), {}, first, count}}, options);
    for (uint64_t i = 0; i < n; ++i) {
      const bool set = bits[i / 8] >> i % 8 & 1;
      float g = scale;
      if (scales_per_row && !is_ternary) std::memcpy(&g, &row_scales[i / length * 4], 4);
      const float v = is_ternary ? (signs[i / 8] >> i % 8 & 1 ? -1.0f : 1.0f) : s.at(i);
      const float exact = decoded(value(base, base_dtype, i), v, g, set);
      const float expected = out_dtype == DType::F32 ? exact
                             : out_dtype == DType::F16 ? f16_to_f32(f32_to_f16(exact)) : bf16_to_f32(f32_to_bf16(exact));
      EXPECT(same_or_nan(value(out, out_dtype, i), expected));
      if (i >= first && i < first + count) EXPECT(same_or_nan(value(part, out_dtype, i - first), expected));
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  const Kind kind = Kind(in.below(uint32_t(Kind::Count)));
  if (kind == Kind::File) {
    file(in);
    return 0;
  }
  const bool is_ternary = kind < Kind::MaskBytes;
  const uint64_t n = elements(in, is_ternary ? kTernaryBlock : kMaskBlock);
  switch (kind) {
    case Kind::TernaryBytes: ternary(in.rest(), n); break;
    case Kind::TernaryParts: ternary(ternary_of_parts(in, n), n); break;
    case Kind::TernaryPlane: ternary_plane(in, n); break;
    case Kind::MaskPlane: mask_plane(in, n); break;
    default: {
      const bool parts = kind == Kind::MaskParts;
      const Bytes plane = parts ? mask_of_parts(in, n) : in.bytes(in.take<uint16_t>());
      mask(plane, Shared(in, n), n);
    }
  }
  return 0;
}
