// Any bytes as the journal of an encoding that was interrupted, its records' checksums made right, beside any bytes as
// what it has left: the encoding refuses them, or goes on and makes a file.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <string>

#include "encode.h"
#include "fuzz.h"
#include "kernels.h"

using namespace tallcodec;

namespace {

constexpr char kMaker[] = "m";
constexpr char kBeginning[] = "tallcodec journal 1\nm";

// A file in memory.
class Memory {
 public:
  Memory() : fd(::memfd_create("fuzz", 0)) { EXPECT(fd >= 0); }
  ~Memory() { ::close(fd); }
  void write(const void* data, size_t size) const { EXPECT(::write(fd, data, size) == ssize_t(size)); }
  std::string read() const {
    std::string bytes(size_t(::lseek(fd, 0, SEEK_END)), '\0');
    EXPECT(::pread(fd, bytes.data(), bytes.size(), 0) == ssize_t(bytes.size()));
    return bytes;
  }

  const int fd;
};

Source source(const std::vector<float>& values) { return {reinterpret_cast<const uint8_t*>(values.data()), -1, 0}; }

// Two tensors of a base, a task of each kind; one has an infinity, so that it becomes verbatim.
struct Family {
  std::vector<float> base, other, task, broken;

  Family() {
    for (int i = 0; i < 1400; ++i) base.push_back(std::sin(float(i)));
    task = base;
    for (size_t i = 0; i < task.size(); ++i) task[i] += 0.01f * std::cos(float(i * i));
    other.assign(base.begin(), base.begin() + 40);
    broken = other;
    broken[3] = HUGE_VALF;
  }
};

void encode(int fd, int journal, bool code_masks) {
  static const Family family;
  Recipe recipe;
  recipe.density = 0.3;
  recipe.code_masks = code_masks;
  Encoder encoder(fd, "fuzz.tall", "fuzz", recipe);
  encoder.keep_journal(journal, "fuzz.journal", kMaker);
  encoder.add_task("a", 0.4f, false);
  encoder.add_task("b", 0, true);
  const std::vector<uint64_t> shape{7, 200}, few{40};
  encoder.add_tensor("big", true, DType::F32, shape, DType::F32, source(family.base), kNone);
  encoder.add_tensor("few", true, DType::F32, few, DType::F32, source(family.other), kNone);
  encoder.set_entry(0, 0, Coding::Mask, DType::F32, shape, Reason::None, source(family.task));
  encoder.set_entry(1, 0, Coding::Ternary, DType::F32, shape, Reason::None, source(family.task));
  encoder.set_entry(0, 1, Coding::Mask, DType::F32, few, Reason::None, source(family.broken));
  encoder.set_entry(1, 1, Coding::Base, DType::F32, few, Reason::None, {});
  encoder.run({});
  for (const auto& pending : encoder.verbatim()) encoder.copy_verbatim(pending.task, pending.tensor);
  encoder.finish();
}

// What an encoding that was not interrupted leaves: a file and its journal.
struct Whole {
  std::string file, journal;

  explicit Whole(bool code_masks) {
    const Memory output, kept;
    encode(output.fd, kept.fd, code_masks);
    file = output.read();
    journal = kept.read();
  }
};

// A journal from bytes: records, each 64-bit size, 64-bit sum, bytes. The sums are made right.
void mend(std::string& journal) {
  for (size_t at = sizeof kBeginning - 1; at + 16 <= journal.size();) {
    uint64_t size;
    std::memcpy(&size, &journal[at], sizeof size);
    if (size > journal.size() - at - 16) size = journal.size() - at - 16;
    std::string record = journal.substr(at + 16, size);
    record.resize((size + 63) / 64 * 64);
    const uint64_t sum = find_kernels("scalar")->hash(record.data(), record.size());
    std::memcpy(&journal[at], &size, sizeof size);
    std::memcpy(&journal[at + 8], &sum, sizeof sum);
    at += 16 + size;
  }
}

}  // namespace

// The first byte chooses the coding and where the journal comes from: the input alone, or that of a whole encoding,
// cut short, with some of its bytes changed.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Whole whole[2] = {Whole(false), Whole(true)};
  Input in(data, size);
  const uint8_t kind = in.take<uint8_t>();
  const Whole& made = whole[kind & 1];
  std::string journal = kBeginning, file = made.file;
  if (kind & 2) {
    const std::vector<uint8_t> bytes = in.rest();
    journal.append(bytes.begin(), bytes.end());
  } else {
    journal = made.journal.substr(0, made.journal.size() - in.take<uint16_t>() % (made.journal.size() - sizeof kBeginning));
    file.resize(file.size() - in.take<uint16_t>() % file.size());
    for (uint32_t changes = in.below(8); changes; --changes) {
      const size_t at = in.take<uint32_t>() % journal.size();
      if (at >= sizeof kBeginning) journal[at] = in.take<char>();
    }
    if (kind & 4) file[in.take<uint32_t>() % file.size()] ^= 1;
  }
  const bool changed = kind & 2 || in.below(2);
  if (changed) mend(journal);
  const Memory output, kept;
  output.write(file.data(), file.size());
  kept.write(journal.data(), journal.size());
  try {
    encode(output.fd, kept.fd, kind & 1);
  } catch (const Error& e) {
    EXPECT(!e.message.empty());
    return 0;
  }
  if (!changed) EXPECT(output.read() == made.file);
  return 0;
}
