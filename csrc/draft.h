// A file being written: its tensors, tasks and planes before they have their final numbers.
#pragma once
#include <functional>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "encode.h"
#include "extend.h"
#include "float_environment.h"
#include "journal.h"
#include "parallel.h"

namespace tallcodec {

struct DraftPlane {
  PlaneRecord record{};
  std::vector<uint64_t> sums;
  bool dropped = false;
};

struct DraftEntry {
  EntryRecord record{};
  std::vector<uint64_t> shape;
  Source source;
};

struct DraftTensor {
  std::string name;
  TensorRecord record{};
  std::vector<uint64_t> shape;
  DType shared_dtype{};  // what a shared vector will have, if there is one
  Source base;
  std::vector<DraftEntry> entries;  // one per task
  std::vector<uint64_t> counts;
  // Where a file is changed: the number of the tensor there whose base and shared vector this one has.
  uint32_t stored = kNone;
  bool untied = false;  // which it was an alias of

  // Whether base and shared vector are in the file already, and stay as they are.
  bool is_stored() const { return stored != kNone; }

  uint64_t elements() const {
    return std::accumulate(shape.begin(), shape.end(), uint64_t{1}, std::multiplies<>());
  }
  uint64_t rows() const { return shape.size() < 2 ? 1 : shape[0]; }
  uint64_t units() const { return (elements() + kUnit - 1) / kUnit; }
  // The tasks that are coded against the shared vector, of all trials.
  std::vector<uint32_t> coded() const {
    std::vector<uint32_t> tasks;
    for (uint32_t k = 0; k < entries.size(); ++k) {
      if (entries[k].record.coding == Coding::Mask) tasks.push_back(k);
    }
    return tasks;
  }
};

struct DraftTask {
  std::string name;
  float threshold;
  Method method;
};

struct DraftMeta {
  uint32_t scope;
  std::string key, value;
};

// Planes are named by their place in `planes` here; finish() numbers those that are left.
struct Draft {
  int fd = -1;
  std::string label;
  std::string writer;
  Recipe recipe;
  std::vector<DraftTask> tasks;
  std::vector<DraftTensor> tensors;
  std::vector<DraftPlane> planes;
  std::vector<std::pair<FileRecord, std::string>> files;
  std::vector<DraftMeta> metas;
  std::optional<Original> original;  // where a file is changed
  uint64_t begin = 0;                // what is before it is not written
  uint64_t end = sizeof(Header);     // where the next plane goes
  uint64_t masks = 0;             // where the masks begin
  const Kernels* kernels = nullptr;
  Journal journal;

  // The tasks that are coded against a tensor's shared vector and whose values are read: of the first trial.
  std::vector<uint32_t> read_tasks(const DraftTensor& t) const {
    std::vector<uint32_t> tasks = t.coded();
    tasks.resize(tasks.size() / recipe.trials);
    return tasks;
  }
  // Reserves the planes of base, shared vectors and masks: one task's masks lie together.
  void place();
  uint32_t reserve(PlaneKind kind, PlaneCoding coding, uint64_t size, uint64_t raw_size);
  uint32_t reserve(PlaneKind kind, uint64_t size) {
    return reserve(kind, PlaneCoding::Raw, size, size);
  }
  // Checksums and writes a part of a plane that begins at a checksum block; all parts but the
  // plane's last are whole blocks. Several threads may write different parts at once.
  void put(uint32_t plane, uint64_t position, const void* data, uint64_t size);
  // Writes at an offset of the file, which is not checksummed.
  void write(const void* data, uint64_t size, uint64_t offset) const;
  // Checksums a plane as it is in the file.
  void sum(uint32_t plane);
  // Whether a plane, and what is behind it up to where another may begin, is as it was written.
  bool intact(const DraftPlane& plane) const;
  // Copies the bytes of a plane, and zeros up to where another may begin, to another place.
  void copy(uint64_t from, uint64_t to, uint64_t size) const;
  Source source(uint32_t plane) const { return {nullptr, fd, planes[plane].record.offset}; }
  uint32_t append(PlaneKind kind, PlaneCoding coding, std::string_view bytes, uint64_t raw_size);
  // Ends the file at `size`. Dropped planes from `begin` on were behind it, or between what moved up.
  void truncate(uint64_t begin, uint64_t size);
  void resize(uint64_t size) const;
  // What was reserved for the plane becomes a free range; its name becomes kNone.
  void drop(uint32_t& plane);
  // An entry with NaN or infinity, its task's or the base's, becomes verbatim.
  void leave_out(EntryRecord& entry, bool base_nonfinite);
  // Tasks with NaN or infinity (flags, one per coded task) become verbatim in the tensor, all of
  // them where the base has one. Gives whether any did.
  bool leave_out(DraftTensor& t, bool base_nonfinite, const std::vector<uint8_t>& nonfinite);
  // Writes the index and, last of all, the header; gives the file's size.
  uint64_t finish();
  void clear(uint64_t offset, uint64_t size) const;
};

// The values of a tensor's base and of its coded tasks (of the first trial), a stretch at a time. To be
// reused: it keeps its buffers.
class Values {
 public:
  void open(const Draft& draft, const DraftTensor& tensor);
  // Elements first .. first + n; what was read before is gone.
  void read(uint64_t first, uint64_t n);

  const void* base = nullptr;
  std::vector<const void*> task;
  std::vector<DType> dtype;

 private:
  const Draft* draft_ = nullptr;
  const DraftTensor* tensor_ = nullptr;
  std::vector<uint32_t> tasks_;
  std::vector<uint8_t> base_buffer_;
  std::vector<std::vector<uint8_t>> task_buffer_;
};

// A unit of a tensor that is read, of its base and these tasks. Others may change what the tensor's tasks are
// while it is, so they are named beforehand.
struct Reading {
  const DraftTensor& tensor;
  uint64_t unit;
  const std::vector<uint32_t>& tasks;

  // Tell the system that it will be read soon, or has been and is not needed any more.
  void will_be() const;
  void has_been() const;
};

// Runs body(item, worker) for items of which each reads what reading(item) says.
template <class Item, class Where, class Body>
void for_each_reading(const std::vector<Item>& items, const Options& options, const char* step, Where reading,
                      Body body) {
  parallel_for(items.size(), options.threads, watch(options, step), [&](uint64_t i, unsigned worker) {
    FloatEnvironment in_this_thread;
    const uint64_t ahead = i + std::max(1u, options.threads);
    if (ahead < items.size()) reading(items[ahead]).will_be();
    body(items[i], worker);
    if (options.drop_cache) reading(items[i]).has_been();
  });
}

// How messages name a tensor of a task, or of the base.
std::string who(const Draft& d, const DraftTensor& t, uint32_t task = kNone);

// Elements first .. first + n of a tensor of a task, or of the base, as Source::view gives them; its error then
// says whose they are.
const uint8_t* elements_of(const Draft& d, const DraftTensor& t, uint32_t task, uint64_t first, uint64_t n,
                           std::vector<uint8_t>& buffer);

}  // namespace tallcodec
