// The core without Python: a small file encoded, decoded, and then damaged in every way that a bit or a
// missing end can do, with the checksums as they are and with those of header and index made right again.
// Meant to be run under sanitizers: no byte from a file may take the reader outside its buffers.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"
#include "draft.h"
#include "sample.h"

using namespace tallcodec;

namespace {

// Everything a file decodes to; what a reader refuses is left out and counted.
struct Decoded {
  std::map<std::string, Bytes> tensors;
  int refused = 0;
};

Decoded decode(const Bytes& bytes, const std::vector<float>& base,
               const Kernels* kernels = nullptr, bool verify = true) {
  Decoded result;
  Options options;
  options.kernels = kernels;
  options.verify = verify;
  try {
    File file("test.tall", bytes.size(), [&](uint64_t offset, uint64_t size) {
      CHECK(offset <= bytes.size() && size <= bytes.size() - offset);
      return bytes.data() + offset;
    });
    const Index& index = file.index();
    for (uint32_t k = 0; k <= index.tasks.size(); ++k) {
      uint32_t task = k == index.tasks.size() ? kNone : k;
      for (uint32_t i = 0; i < index.tensors.size(); ++i) {
        try {
          if (!file.has(task, i)) continue;
          TensorInfo info = file.info(task, i);
          if (info.nbytes > 1 << 20) continue;  // what a caller would not allocate
          Bytes out(info.nbytes, 0xEE);
          Source external;
          if (file.needs_base(task, i)) {
            external = info.nbytes == base.size() * sizeof(float) ? source(base) : Source{};
          }
          file.decode({{task, i, out.data(), external}}, options);
          const uint32_t size = size_of(info.dtype);
          const uint64_t n = info.nbytes / size, first = n / 3, count = n / 4;
          Bytes part(count * size), again(info.nbytes, 0xEE);
          file.decode({{task, i, part.data(), external, first, count}}, options);
          CHECK(std::equal(part.begin(), part.end(), out.begin() + ptrdiff_t(first * size)));
          const Loaded loaded = file.load(task, {{task, i, nullptr, external, first, count}}, options);
          Options from_memory = options;
          from_memory.loaded = &loaded;
          file.decode({{task, i, again.data(), external}}, from_memory);
          CHECK(again == out);
          const std::string name(index.text(index.tensors[i].name));
          result.tensors[std::to_string(task) + "/" + name] = out;
          if (task != kNone) continue;
          file.merge({{task, i, out.data(), external}}, {2, 0.5f}, options);
          result.tensors["merged/" + name] = out;
          const MaskCounts counts = file.count_masks({i}, options).at(0);
          const auto* bytes = reinterpret_cast<const uint8_t*>(counts.overlap.data());
          result.tensors["overlap/" + name] = Bytes(bytes, bytes + counts.overlap.size() * 8);
        } catch (const Error&) {
          ++result.refused;
        }
      }
    }
    for (const FileRecord& f : index.files) {
      try {
        if (f.plane == kNone || index.planes[f.plane].raw_size > 1 << 20) continue;
        Bytes out = file.read_plane(f.plane, options);
        result.tensors["file/" + std::string(index.text(f.name))] = out;
      } catch (const Error&) {
        ++result.refused;
      }
    }
    file.verify(options);
    for (uint32_t p = 0; p < index.planes.size(); ++p) file.describe(p);
  } catch (const Error&) {
    ++result.refused;
  }
  return result;
}

// What is decoded from a damaged file is what the sound one gives, or refused.
bool harmless(const Decoded& damaged, const Decoded& sound) {
  if (damaged.tensors.size() + damaged.refused < sound.tensors.size() && !damaged.refused) return false;
  for (const auto& [name, bytes] : damaged.tensors) {
    auto it = sound.tensors.find(name);
    if (it == sound.tensors.end() || it->second != bytes) return false;
  }
  return true;
}

// Makes the checksums of slot and index right, so that the validator has to find what is wrong.
void fix_checksums(Bytes& file) {
  Header header;
  std::memcpy(&header, file.data(), sizeof header);
  Slot& slot = header.slot[0];
  if (slot.index_offset <= file.size() && slot.index_size <= file.size() - slot.index_offset &&
      slot.index_size % 64 == 0) {
    slot.index_hash = find_kernels("scalar")->hash(file.data() + slot.index_offset, slot.index_size);
  }
  slot.slot_hash = hash_slot(header, slot);
  std::memcpy(file.data(), &header, sizeof header);
}

// Offsets and sizes of a tensor of 2^33 elements, by arithmetic: nothing of that size is allocated.
void test_placement_of_large_tensors() {
  constexpr uint64_t n = uint64_t{1} << 33;
  Draft draft;
  draft.tasks = {{"a", 0.4f, Method::Tall}, {"b", 0.4f, Method::Tall}};
  DraftTensor t;
  t.shape = {uint64_t{1} << 20, uint64_t{1} << 13};
  t.shared_dtype = DType::I8;
  t.record.in_base = 1;
  t.record.dtype = DType::BF16;
  t.record.alias = kNone;
  t.entries.resize(2);
  for (DraftEntry& e : t.entries) e.record.coding = Coding::Mask;
  draft.tensors.push_back(t);
  draft.place();

  const uint64_t sizes[] = {2 * n, n, n / 128 * 4, n / 8, n / 8};
  uint64_t offset = sizeof(Header);
  CHECK(draft.planes.size() == 5);
  for (size_t i = 0; i < draft.planes.size(); ++i) {
    const PlaneRecord& p = draft.planes[i].record;
    CHECK(p.offset == offset && p.size == sizes[i] && p.raw_size == sizes[i]);
    CHECK(draft.planes[i].sums.size() == sizes[i] / kSumBlock);
    offset += sizes[i];
  }
  CHECK(draft.end == offset);
}

void damage(const Bytes& file, const std::vector<float>& base) {
  const Decoded sound = decode(file, base);
  CHECK(sound.refused == 0);
  for (auto kernels = available_kernels(); *kernels; ++kernels) {
    CHECK(decode(file, base, *kernels).tensors == sound.tensors);
  }
  CHECK(sound.tensors.size() == 26);  // 5 of task a, 4 of b, 4 of the base, merged, overlap, a file

  int flips_refused = 0;
  for (size_t at = 0; at < file.size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      Bytes flipped = file;
      flipped[at] ^= uint8_t(1 << bit);
      Decoded result = decode(flipped, base);
      CHECK(harmless(result, sound));
      flips_refused += result.refused > 0;
    }
  }
  CHECK(flips_refused > 0);
  for (size_t size = 0; size < file.size(); ++size) {
    Decoded result = decode(Bytes(file.begin(), file.begin() + size), base);
    CHECK(result.tensors.empty() && result.refused == 1);
  }
  // Beyond checksums: whatever the index says, reading it stays within the file and the buffers.
  std::mt19937 random(2);
  const Header* header = reinterpret_cast<const Header*>(file.data());
  const uint64_t begin = header->slot[0].index_offset, size = header->slot[0].index_size;
  for (int round = 0; round < 20000; ++round) {
    Bytes hostile = file;
    for (int changes = 1 + random() % 3; changes; --changes) {
      size_t at = random() % 8 ? begin + random() % size : 64 + random() % 64;
      const uint8_t odd[] = {0, 1, 0x7F, 0x80, 0xFF, uint8_t(random())};
      hostile[at] = odd[random() % 6];
    }
    if (random() % 4 == 0) {  // kinds, codings and sizes of planes, together
      const IndexHeader& h = *reinterpret_cast<const IndexHeader*>(file.data() + begin);
      uint64_t planes = begin + sizeof h + 64ull * (h.tensors + h.tasks + h.tensors * h.tasks);
      uint8_t* plane = hostile.data() + planes + random() % h.planes * sizeof(PlaneRecord);
      plane[random() % 2] = uint8_t(random() % 10);
      uint64_t raw_size = random() % 2 ? random() % 100000 : uint64_t{1} << random() % 64;
      std::memcpy(plane + offsetof(PlaneRecord, raw_size), &raw_size, sizeof raw_size);
    }
    fix_checksums(hostile);
    decode(hostile, base);
  }
}

// Coded planes whose bytes are anything, believed without a look at checksums: long enough to be coded, and
// so too long for every bit.
void damage_coded_planes(const Bytes& file, const std::vector<float>& base) {
  const Decoded sound = decode(file, base);
  CHECK(sound.refused == 0);
  std::vector<std::pair<uint64_t, uint64_t>> coded;
  File opened("test.tall", file.size(), [&](uint64_t offset, uint64_t) { return file.data() + offset; });
  for (const PlaneRecord& p : opened.index().planes) {
    if (p.kind != PlaneKind::Base && p.kind != PlaneKind::File) coded.emplace_back(p.offset, p.size);
  }
  std::mt19937 random(3);
  int refused = 0;
  for (int round = 0; round < 1500; ++round) {
    Bytes hostile = file;
    const auto [offset, size] = coded[random() % coded.size()];
    for (int changes = 1 + random() % 4; changes; --changes) {
      const uint64_t at = random() % 2 ? random() % size : random() % std::min<uint64_t>(size, 150);
      hostile[offset + at] = random() % 3 ? uint8_t(random()) : 0xFF;
    }
    refused += decode(hostile, base, nullptr, false).refused > 0;
  }
  CHECK(refused > 300);
}

}  // namespace

int main() {
  const std::vector<float> base = random_base(6 * 35), long_base = random_base(6 * 1500);
  test_placement_of_large_tensors();
  Recipe plain, rows, ties;
  rows.scale = ScaleMode::UnitGainRow;
  rows.storage = BaseStorage::Referenced;
  rows.merge = Merge::Average;
  ties.merge = Merge::Ties;
  ties.method = Method::Magnitude;
  ties.density = 0.2;
  uint64_t all = 0;  // of the bytes of all files, which are the same on every machine
  for (const auto& [recipe, shared] :
       {std::pair{plain, DType::F32}, {rows, DType::I8}, {ties, DType::BF16}}) {
    Bytes file = encode(*available_kernels(), recipe, shared, base);
    all = 31 * all + kernels_scalar.hash(file.data(), file.size());
    for (auto kernels = available_kernels(); *kernels; ++kernels) {
      CHECK(encode(*kernels, recipe, shared, base) == file);
    }
    damage(file, base);
  }
  plain.code_masks = true;
  rows.code_masks = true;
  rows.code_ternary = false;
  for (const auto& [recipe, shared] : {std::pair{plain, DType::F32}, {plain, DType::F16}, {rows, DType::I8}}) {
    Bytes file = encode(*available_kernels(), recipe, shared, long_base);
    all = 31 * all + kernels_scalar.hash(file.data(), file.size());
    damage_coded_planes(file, long_base);
  }
  check(all == 0x19560fb43fe7a7e9, "the files are others: %016llx", static_cast<unsigned long long>(all));
  std::printf("files: %d passed, %d failed\n", passed, failed);
  return failed != 0;
}
