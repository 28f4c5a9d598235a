#include "journal.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

#include "draft.h"
#include "kernels.h"
#include "parallel.h"
#include "rans.h"
#include "text.h"

namespace tallcodec {
namespace {

constexpr char kBeginning[] = "tallcodec journal 1\n";

uint64_t checksum(const std::string& bytes) {
  return hash_block(*find_kernels("scalar"), reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
}

template <class T>
void append_all(std::string& to, const std::vector<T>& values) {
  append(to, uint64_t{values.size()});
  to.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

// Takes what `append` and `append_all` have put, in order; what is not there is an Error(Status::Format).
class Reader {
 public:
  explicit Reader(std::string_view bytes) : bytes_(bytes) {}

  bool empty() const { return bytes_.empty(); }

  std::string_view take(uint64_t size) {
    require(size <= bytes_.size(), "it is cut short");
    const std::string_view taken = bytes_.substr(0, size);
    bytes_.remove_prefix(size);
    return taken;
  }

  template <class T>
  T take() {
    return read<T>(reinterpret_cast<const uint8_t*>(take(sizeof(T)).data()));
  }

  template <class T>
  std::vector<T> take_all() {
    const auto count = take<uint64_t>();
    require(count <= bytes_.size() / sizeof(T), "it is cut short");
    std::vector<T> values(count);
    const std::string_view taken = take(count * sizeof(T));
    std::copy(taken.begin(), taken.end(), reinterpret_cast<char*>(values.data()));
    return values;
  }

 private:
  std::string_view bytes_;
};

}  // namespace

struct Journal::Record {
  Step step;
  uint32_t number;
  uint64_t end;  // of the planes
  std::string note;
  std::map<uint32_t, DraftPlane> planes;
  std::map<uint32_t, std::pair<TensorRecord, std::vector<uint64_t>>> tensors;
  std::map<std::pair<uint32_t, uint32_t>, EntryRecord> entries;
};

Journal& Journal::operator=(Journal&& other) {
  fd_ = other.fd_;
  label_ = std::move(other.label_);
  maker_ = std::move(other.maker_);
  return *this;
}

void Journal::add(Step step, uint32_t number, const Draft& d, const Changes& changes) {
  if (fd_ < 0) return;
  std::string bytes;
  append(bytes, step);
  append(bytes, number);
  append(bytes, d.end);
  append(bytes, uint64_t{changes.note.size()});
  bytes += changes.note;
  append(bytes, uint64_t{changes.planes.size()});
  for (uint32_t id : changes.planes) {
    const DraftPlane& plane = d.planes[id];
    append(bytes, id);
    append(bytes, plane.record);
    append(bytes, uint8_t{plane.dropped});
    append_all(bytes, plane.sums);
  }
  auto entries = changes.entries;
  append(bytes, uint64_t{changes.tensors.size()});
  for (uint32_t i : changes.tensors) {
    append(bytes, i);
    append(bytes, d.tensors[i].record);
    append_all(bytes, d.tensors[i].counts);
    for (uint32_t k = 0; k < d.tasks.size(); ++k) entries.emplace_back(k, i);
  }
  append(bytes, uint64_t{entries.size()});
  for (const auto& [task, tensor] : entries) {
    append(bytes, task);
    append(bytes, tensor);
    append(bytes, d.tensors[tensor].entries[task].record);
  }
  std::string record;
  append(record, uint64_t{bytes.size()});
  append(record, checksum(bytes));
  record += bytes;
  std::lock_guard lock(mutex_);
  write_all(fd_, label_, record.data(), record.size(), size_);
  size_ += record.size();
}

// The records that are whole; the others go.
std::vector<Journal::Record> Journal::read() {
  const auto size = static_cast<uint64_t>(::lseek(fd_, 0, SEEK_END));
  std::vector<uint8_t> buffer;
  const Source source{nullptr, fd_, 0};
  const std::string_view bytes(reinterpret_cast<const char*>(source.view(0, size, buffer)), size);
  const std::string beginning = kBeginning + maker_;
  std::vector<Record> records;
  if (size < beginning.size() && beginning.compare(0, size, bytes) == 0) {  // new, or hardly begun
    write_all(fd_, label_, beginning.data(), beginning.size(), 0);
    size_ = beginning.size();
    return records;
  }
  if (bytes.substr(0, beginning.size()) != beginning) {
    throw Error(Status::Argument, text(label_, " is of an encoding of other checkpoints, or with other options, "
                                          "or by another version: to start anew, remove it"));
  }
  Reader reader(bytes.substr(beginning.size()));
  size_ = beginning.size();
  try {
    while (!reader.empty()) {
      const auto record_size = reader.take<uint64_t>(), sum = reader.take<uint64_t>();
      const std::string record_bytes(reader.take(record_size));
      require(checksum(record_bytes) == sum, "a record is damaged");
      Reader fields(record_bytes);
      Record r{};
      r.step = fields.take<Step>();
      r.number = fields.take<uint32_t>();
      r.end = fields.take<uint64_t>();
      r.note = fields.take(fields.take<uint64_t>());
      for (auto count = fields.take<uint64_t>(); count--;) {
        const auto id = fields.take<uint32_t>();
        DraftPlane plane;
        plane.record = fields.take<PlaneRecord>();
        plane.dropped = fields.take<uint8_t>();
        plane.sums = fields.take_all<uint64_t>();
        r.planes[id] = std::move(plane);
      }
      for (auto count = fields.take<uint64_t>(); count--;) {
        const auto id = fields.take<uint32_t>();
        const auto tensor = fields.take<TensorRecord>();
        r.tensors[id] = {tensor, fields.take_all<uint64_t>()};
      }
      for (auto count = fields.take<uint64_t>(); count--;) {
        const auto task = fields.take<uint32_t>(), tensor = fields.take<uint32_t>();
        r.entries[{task, tensor}] = fields.take<EntryRecord>();
      }
      records.push_back(std::move(r));
      size_ += 16 + record_size;
    }
  } catch (const Error&) {
    // Whoever wrote it was interrupted.
  }
  shorten();
  return records;
}

void Journal::shorten() const {
  if (::ftruncate(fd_, static_cast<off_t>(size_)) != 0) {
    throw Error(Status::Write, text(label_, ": its journal cannot be cut short: ", std::strerror(errno)), errno);
  }
}

// Planes beyond those that are reserved are ternary ones. No plane grows.
bool Journal::fits(const Record& r, const Draft& d) {
  const auto count = d.planes.size() + d.tasks.size() * d.tensors.size();
  const auto same = [](uint32_t plane, uint32_t reserved) { return plane == reserved || plane == kNone; };
  constexpr uint64_t kMost = uint64_t{1} << 62;
  if (r.step < Step::Surveyed || r.step > Step::Sparsified || r.end > kMost) return false;
  if (r.step == Step::Surveyed && r.note.size() != 4 * (1 + d.tasks.size() / d.recipe.trials)) return false;
  for (const auto& [id, plane] : r.planes) {
    const PlaneRecord& p = plane.record;
    const bool external = p.coding == PlaneCoding::External;
    if (id >= count || p.size > r.end || p.offset > kMost || p.raw_size > kMost) return false;
    if (id < d.planes.size()) {
      const PlaneRecord& reserved = d.planes[id].record;
      const bool same = p.kind == reserved.kind && p.raw_size == reserved.raw_size && p.size <= reserved.size;
      if (!same || external != (reserved.coding == PlaneCoding::External)) return false;
    } else if (p.kind != PlaneKind::Ternary || external) {
      return false;
    }
    if (plane.sums.size() != sum_count(external ? p.raw_size : p.size) && !plane.dropped) return false;
    if (!external && p.offset + p.size > r.end && r.step != Step::Waiting) return false;
  }
  for (const auto& [id, tensor] : r.tensors) {
    if (id >= d.tensors.size() || tensor.second.size() > d.tasks.size() + 1) return false;
    const TensorRecord &now = tensor.first, &then = d.tensors[id].record;
    if (now.base_plane != then.base_plane || !same(now.shared_plane, then.shared_plane) ||
        !same(now.shared_scales_plane, then.shared_scales_plane)) {
      return false;
    }
    if (now.dtype != then.dtype || now.rank != then.rank || now.in_base != then.in_base || now.alias != then.alias) {
      return false;
    }
    const bool has_shared = now.shared_plane == then.shared_plane && now.shared_scales_plane == then.shared_scales_plane &&
                            now.shared_dtype == then.shared_dtype;
    for (uint32_t k = 0; k < d.tasks.size() && !has_shared; ++k) {
      const auto entry = r.entries.find({k, id});
      if (entry == r.entries.end() || entry->second.coding == Coding::Mask) return false;
    }
  }
  for (const auto& [where, entry] : r.entries) {
    if (where.first >= d.tasks.size() || where.second >= d.tensors.size()) return false;
    const EntryRecord& then = d.tensors[where.second].entries[where.first].record;
    if (entry.dtype != then.dtype || entry.rank != then.rank) return false;
    const bool ternary = entry.coding == Coding::Ternary && entry.plane >= d.planes.size() && entry.plane < count;
    const bool kept = entry.coding == then.coding && (ternary || entry.plane == then.plane) &&
                      same(entry.scales_plane, then.scales_plane);
    // For a NaN or an infinity.
    const bool left_out = entry.coding == Coding::Verbatim && entry.plane == kNone && entry.scales_plane == kNone &&
                          (then.coding == Coding::Mask || then.coding == Coding::Ternary);
    if (!kept && !left_out) return false;
  }
  return true;
}

void Journal::restore(Draft& d, const Options& options) {
  if (fd_ < 0) return;
  std::vector<Record> records = read();
  for (const Record& record : records) {
    if (fits(record, d)) continue;
    throw Error(Status::Argument, text(label_, " has a journal that does not belong to it: to start anew, remove both"));
  }
  d.resize(align64(std::max(d.end, static_cast<uint64_t>(::lseek(d.fd, 0, SEEK_END)))));  // or longer

  // Every plane as the last record has it, to be checked, in the file, against its sums.
  struct Item {
    size_t record;
    DraftPlane* plane;
  };
  std::map<uint32_t, Item> last;
  for (size_t r = 0; r < records.size(); ++r) {
    for (auto& [id, plane] : records[r].planes) last[id] = {r, &plane};
  }
  std::vector<Item> items;
  for (const auto& [id, item] : last) {
    const bool stored = item.plane->record.coding != PlaneCoding::External && !item.plane->dropped;
    if (stored) items.push_back(item);
  }
  std::vector<std::atomic<bool>> damaged(records.size());
  parallel_for(items.size(), options.threads, watch(options, "verifying"), [&](uint64_t i, unsigned) {
    if (!d.intact(*items[i].plane)) damaged[items[i].record] = true;
  });
  // A tensor can be encoded again, as long as nothing has been made of it.
  bool lost = false, used = false;
  for (size_t r = records.size(); r-- > 0;) {
    used |= records[r].step > Step::Encoded;
    lost |= damaged[r] && used;
  }
  if (lost) {
    records.clear();
    size_ = sizeof kBeginning - 1 + maker_.size();
    shorten();
  }
  for (size_t r = 0; r < records.size(); ++r) {
    Record& record = records[r];
    if (damaged[r]) {
      done_.erase({record.step, record.number});
      for (const auto& [id, plane] : record.planes) last.erase(id);
      continue;
    }
    done_[{record.step, record.number}] = record.note;
    d.end = record.end;
    for (auto& [id, plane] : record.planes) {
      if (id >= d.planes.size()) d.planes.resize(id + 1);
      d.planes[id] = plane;
    }
    for (auto& [id, tensor] : record.tensors) {
      d.tensors.at(id).record = tensor.first;
      d.tensors[id].counts = tensor.second;
    }
    for (auto& [where, entry] : record.entries) d.tensors.at(where.second).entries.at(where.first).record = entry;
  }
  // What will be written again does not write what is between planes.
  for (uint32_t id = 0; id < d.planes.size(); ++id) {
    const PlaneRecord& p = d.planes[id].record;
    if (p.coding != PlaneCoding::External && !last.count(id)) d.clear(p.offset + p.size, align64(p.size) - p.size);
  }
  // Behind the planes is what was not finished, but for a plane that waits there for its place.
  if (records.empty()) d.resize(0);
  if (records.empty() || records.back().step != Step::Waiting) d.resize(d.end);
}

}  // namespace tallcodec
