// Any bytes as a file: opened, asked everything, decoded, merged, counted, verified. Once as they are, once with
// the checksums made right, so that what is behind them is reached, too.
#include <set>
#include <string>

#include "format.h"
#include "fuzz.h"
#include "kernels.h"

using namespace tallcodec;

namespace {

constexpr uint64_t kMost = 1 << 20;  // bytes that this caller asks for at once, at most

uint64_t hash(const uint8_t* data, uint64_t size) { return find_kernels("scalar")->hash(data, size); }

// Makes the checksums of a file right, as far as it has any.
class Mender {
 public:
  Mender(uint8_t* data, size_t size) : data_(data), size_(size) {}

  void run() {
    if (size_ < sizeof(Header)) return;
    Header header;
    std::memcpy(&header, data_, sizeof header);
    for (Slot& slot : header.slot) {
      if (!slot.sequence) continue;
      if (slot.index_offset <= size_ && slot.index_size <= size_ - slot.index_offset && slot.index_size % kAlign == 0) {
        planes(data_ + slot.index_offset, slot.index_size);
        slot.index_hash = hash(data_ + slot.index_offset, slot.index_size);
      }
      slot.slot_hash = hash_slot(header, slot);
    }
    std::memcpy(data_, &header, sizeof header);
  }

 private:
  void planes(uint8_t* index, uint64_t size) {
    IndexHeader h;
    if (size < sizeof h) return;
    std::memcpy(&h, index, sizeof h);
    const double entries = double(h.tensors) * h.tasks;  // in doubles, which do not wrap around
    const double planes = sizeof h + 64.0 * (h.tensors + double(h.tasks) + entries);
    const double sums = planes + 40.0 * h.planes + 16.0 * h.free + 16.0 * h.files + 24.0 * h.metas + 8.0 * double(h.dims);
    if (sums + 8.0 * double(h.sums) > double(size)) return;
    for (uint32_t i = 0; i < h.planes; ++i) {
      PlaneRecord p;
      std::memcpy(&p, index + uint64_t(planes) + i * sizeof p, sizeof p);
      if (p.coding == PlaneCoding::External || p.offset > size_ || p.size > size_ - p.offset) continue;
      if (align64(p.size) > size_ - p.offset || p.first_sum > h.sums) continue;
      for (uint64_t b = 0; b < sum_count(p.size) && b < h.sums - p.first_sum; ++b) {
        const uint64_t at = p.offset + b * kSumBlock;
        const uint64_t sum = hash(data_ + at, std::min(kSumBlock, p.offset + align64(p.size) - at));
        std::memcpy(index + uint64_t(sums) + (p.first_sum + b) * sizeof sum, &sum, sizeof sum);
      }
    }
  }

  uint8_t* data_;
  uint64_t size_;
};

template <class Body>
void refusable(Body body) {
  try {
    body();
  } catch (const Error& e) {
    EXPECT(!e.message.empty() && e.status != Status::Argument);
  }
}

// No frame is sound here but those that claim an even size.
void inflate(const uint8_t* data, uint64_t size, uint8_t* out, uint64_t raw_size) {
  if (raw_size > kMost || raw_size % 2) throw Error(Status::Format, "no sound frame");
  std::memset(out, size ? data[size - 1] : 0, raw_size);
}

// A tensor of a task, or of the base: whole, in part, from memory, by every kernel the same.
void decode(const File& file, uint32_t task, uint32_t tensor, const Options& options) {
  if (!file.has(task, tensor)) return;
  const TensorInfo info = file.info(task, tensor);
  for (const Range& r : file.ranges(task, tensor)) EXPECT(r.offset <= file.size() && r.size <= file.size() - r.offset);
  if (info.nbytes > kMost) return;
  const uint32_t size = size_of(info.dtype);
  const uint64_t n = info.nbytes / size, first = n / 3, count = n / 4;
  std::vector<uint8_t> base;
  Source source;
  if (file.needs_base(task, tensor)) {
    base.resize(file.info(kNone, tensor).nbytes, 0x3c);
    if (base.size() > kMost) return;
    source = {base.data(), -1, 0};
  }
  const Buffer whole(info.nbytes), part(count * size), again(info.nbytes);
  bool sound = false;
  refusable([&] {
    file.decode({{task, tensor, whole.data(), source}}, options);
    sound = true;
  });
  bool loadable = false;
  Loaded loaded;
  refusable([&] {
    loaded = file.load(task, {{task, tensor, nullptr, source}}, options);
    loadable = true;
  });
  EXPECT(loaded.bytes() <= 3 * (kMost + 8));
  if (task != kNone) EXPECT(loadable == sound);
  if (!sound) return;
  file.decode({{task, tensor, part.data(), source, first, count}}, options);
  EXPECT(std::equal(part.data(), part.data() + part.size(), whole.data() + first * size));
  if (loadable) {
    Options from_memory = options;
    from_memory.loaded = &loaded;
    file.decode({{task, tensor, again.data(), source}}, from_memory);
    EXPECT(again == whole);
  }
  if (task != kNone || info.nbytes > kMost) return;
  refusable([&] { file.merge({{kNone, tensor, again.data(), source}}, {0, 0.5f}, options); });
  refusable([&] { file.merge({{kNone, tensor, again.data(), source}}, {2, 0.5f}, options); });
  refusable([&] { file.count_masks({tensor}, options); });
}

void read(const uint8_t* data, uint64_t size, bool verify) {
  Options options;
  options.verify = verify;
  options.inflate = inflate;
  const File file("fuzz.tall", size, [&](uint64_t offset, uint64_t wanted) {
    EXPECT(offset <= size && wanted <= size - offset);
    return data + offset;
  });
  EXPECT(file.size() <= size);
  const Index& index = file.index();
  const auto tasks = file.tasks(), tensors = file.tensors();
  for (uint32_t k = 0; k < tasks.size(); ++k) EXPECT(file.find_task(tasks[k]) == k);
  for (uint32_t i = 0; i < tensors.size(); ++i) EXPECT(file.find_tensor(tensors[i]) == i);
  refusable([&] { file.find_task("\n"); });
  refusable([&] { file.find_tensor(""); });
  uint64_t work = 0;  // a small file may name one plane very often
  for (uint32_t k = 0; k <= tasks.size(); ++k) {
    for (uint32_t i = 0; i < tensors.size(); ++i) {
      if (++work > 2000) break;
      refusable([&] { decode(file, k == tasks.size() ? kNone : k, i, options); });
    }
  }
  std::set<uint32_t> planes;
  for (const FileRecord& f : index.files) {
    if (f.plane == kNone || index.planes[f.plane].raw_size > kMost || !planes.insert(f.plane).second) continue;
    refusable([&] { EXPECT(file.read_plane(f.plane, options).size() == index.planes[f.plane].raw_size); });
  }
  refusable([&] {
    for (const Damage& d : file.verify(options)) EXPECT(d.plane < index.planes.size());
  });
  for (uint32_t p = 0; p < std::min<size_t>(index.planes.size(), 100); ++p) EXPECT(!file.describe(p).empty());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const Buffer bytes(std::vector<uint8_t>(data, data + size));
  refusable([&] { read(bytes.data(), size, true); });
  Mender(bytes.data(), size).run();
  refusable([&] { read(bytes.data(), size, true); });
  refusable([&] { read(bytes.data(), size, false); });
  return 0;
}

#ifdef TALLCODEC_LIBFUZZER
extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t most);

// Bytes that move make every offset wrong, so mostly a part of the file is changed in its place: the slots, the
// index or one of its first records, a plane.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t most, unsigned seed) {
  if (size < sizeof(Header) + 64 || seed % 8 == 0) return LLVMFuzzerMutate(data, size, most);
  Header header;
  std::memcpy(&header, data, sizeof header);
  const Slot& slot = header.slot[seed / 8 % 8 == 0 && header.slot[1].sequence];
  uint64_t begin = 64, length = 128;
  const bool there = slot.index_offset < size && slot.index_size <= size - slot.index_offset && slot.index_size;
  const uint32_t what = seed / 64 % 8, where = seed / 512;
  if (what < 5 && there) {  // a few of the index's bytes
    begin = slot.index_offset + where % slot.index_size / 8 * 8;
    length = 8 << where / 65536 % 3;
  } else if (what == 5 && there) {
    begin = slot.index_offset;
    length = slot.index_size;
  } else if (what > 5) {
    begin = sizeof header + where % (size - sizeof header) / 64 * 64;
    length = 64 << where / 65536 % 5;
  }
  length = std::min(length, size - begin);
  std::vector<uint8_t> part(data + begin, data + begin + length);
  const size_t changed = LLVMFuzzerMutate(part.data(), length, length);
  std::copy(part.begin(), part.begin() + ptrdiff_t(changed), data + begin);
  return size;
}
#endif
