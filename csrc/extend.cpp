#include "extend.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>

#include "draft.h"
#include "kernels.h"
#include "mask_math.h"
#include "merge.h"
#include "text.h"
#include "to_float32.h"

namespace tallcodec {
namespace {

Original read_original(int fd, const std::string& label) {
  struct stat found;
  if (::fstat(fd, &found) != 0) {
    throw Error(Status::Read, text(label, ": cannot be read: ", std::strerror(errno)), errno);
  }
  const auto size = static_cast<uint64_t>(found.st_size);
  const Source file{nullptr, fd, 0};
  std::vector<uint8_t> buffer;
  Original o;
  const uint64_t head = std::min<uint64_t>(size, sizeof(Header));
  o.slot = read_header(label, file.view(0, head, buffer), head, size);
  std::memcpy(&o.header, buffer.data(), sizeof o.header);
  o.index = read_index(label, file.view(o.slot.index_offset, o.slot.index_size, buffer), o.slot.index_size, o.slot);
  return o;
}

// What a newer writer has put in a file may refer to what would be moved or dropped here.
void require_known(const std::string& label, const Index& index) {
  const IndexHeader& h = index.header;
  const auto all = [](const auto& records, auto is) { return std::all_of(records.begin(), records.end(), is); };
  const bool known =
      h.merge >= Merge::TaskArithmetic && h.merge <= Merge::Ties && h.scale <= ScaleMode::UnitGainRow &&
      all(index.planes, [](const PlaneRecord& p) { return is_known(p); }) &&
      all(index.tasks, [](const TaskRecord& t) { return is_known(t.method); }) &&
      all(index.entries, [](const EntryRecord& e) { return e.coding <= Coding::Ternary; });
  if (!known) throw Error(Status::Version, text(label, " has what only a newer tallcodec knows; change it with that"));
}

std::vector<uint64_t> shape_of(const Index& index, uint32_t dims, uint8_t rank) {
  return {index.dims.begin() + dims, index.dims.begin() + dims + rank};
}

DraftTensor stored_tensor(const Draft& d, uint32_t number) {
  const Index& index = d.original->index;
  DraftTensor t;
  t.stored = number;
  t.record = index.tensors[number];
  t.name = index.text(t.record.name);
  t.shape = shape_of(index, t.record.dims, t.record.rank);
  t.shared_dtype = t.record.shared_dtype;
  t.counts.assign(index.counts.begin() + t.record.first_count,
                  index.counts.begin() + t.record.first_count + t.record.count_count);
  if (t.record.base_plane != kNone && index.header.base_storage == BaseStorage::Embedded) {
    t.base = d.source(t.record.base_plane);
  }
  return t;
}

DraftTensor new_tensor(std::string name) {
  DraftTensor t;
  t.name = std::move(name);
  t.record.base_plane = t.record.shared_plane = t.record.shared_scales_plane = t.record.alias = kNone;
  return t;
}

// A plane of its own with the same bytes, behind all others.
uint32_t copy_of(Draft& d, uint32_t plane) {
  if (plane == kNone) return kNone;
  const PlaneRecord record = d.planes[plane].record;
  const uint32_t copy = d.reserve(record.kind, record.coding, record.size, record.raw_size);
  d.copy(record.offset, d.planes[copy].record.offset, record.size);
  d.planes[copy].sums = d.planes[plane].sums;
  if (!d.intact(d.planes[copy])) {
    throw Error(Status::Checksum, text(d.label, ": damaged: wrong checksum in plane ", plane));
  }
  return copy;
}

// What a task of the file has for a tensor.
DraftEntry stored_entry(Draft& d, const DraftTensor& t, uint32_t task) {
  const Index& index = d.original->index;
  DraftEntry e;
  if (t.record.alias != kNone) return e;
  if (t.stored == kNone) {
    e.record = absent_entry();
    return e;
  }
  e.record = index.entry(task, t.stored);
  if (e.record.coding == Coding::Verbatim) e.shape = shape_of(index, e.record.dims, e.record.rank);
  if (t.untied && (e.record.coding == Coding::Mask || e.record.coding == Coding::Ternary)) {
    e.record.plane = copy_of(d, e.record.plane);
    e.record.scales_plane = copy_of(d, e.record.scales_plane);
  }
  return e;
}

// Restores side data; the scope of a task is its number, which may be another one now, or gone. What was given anew
// takes the place of what was there.
void restore_side_data(Draft& d) {
  const Index& index = d.original->index;
  const auto count = static_cast<uint32_t>(d.original->kept.size());
  std::map<uint32_t, uint32_t> scopes{{kScopeBase, kScopeBase}, {kScopeFile, kScopeFile}};
  for (uint32_t k = 0; k < count; ++k) scopes[d.original->kept[k]] = k;
  for (auto& file : d.files) {
    if (file.first.scope < kScopeFile) file.first.scope += count;
  }
  for (DraftMeta& meta : d.metas) {
    if (meta.scope < kScopeFile) meta.scope += count;
  }
  for (const FileRecord& f : index.files) {
    const auto scope = scopes.find(f.scope);
    if (scope != scopes.end()) d.files.push_back({{scope->second, f.plane, {}}, std::string(index.text(f.name))});
  }
  for (const MetaRecord& m : index.metas) {
    const auto scope = scopes.find(m.scope);
    if (scope == scopes.end()) continue;
    const std::string key(index.text(m.key));
    const bool given = std::any_of(d.metas.begin(), d.metas.end(), [&](const DraftMeta& meta) {
      return meta.scope == scope->second && meta.key == key;
    });
    if (!given) d.metas.push_back({scope->second, key, std::string(index.text(m.value))});
  }
}

// A shared vector that no mask needs, and counts of other masks than there are now.
void drop_shared(const Original& o, DraftTensor& t) {
  if (t.stored == kNone || t.record.alias != kNone) return;
  const auto is_mask = [](const EntryRecord& e) { return e.coding == Coding::Mask; };
  size_t before = 0, stay = 0, now = 0;
  for (uint32_t k = 0; k < o.index.tasks.size(); ++k) before += is_mask(o.index.entry(k, t.stored));
  for (uint32_t k : o.kept) stay += is_mask(o.index.entry(k, t.stored));
  for (const DraftEntry& e : t.entries) now += is_mask(e.record);
  if (stay != before || stay != now) t.counts.clear();
  if (now) return;
  t.record.shared_dtype = DType{};
  t.record.shared_plane = t.record.shared_scales_plane = kNone;
}

// Tensors that neither the base nor a task has any more.
void drop_absent(Draft& d) {
  std::vector<DraftTensor> left;
  std::vector<uint32_t> number(d.tensors.size(), kNone);
  for (size_t i = 0; i < d.tensors.size(); ++i) {
    DraftTensor& t = d.tensors[i];
    const bool used = t.record.in_base || std::any_of(t.entries.begin(), t.entries.end(), [](const DraftEntry& e) {
      return e.record.coding != Coding::Absent;
    });
    if (!used) continue;
    number[i] = static_cast<uint32_t>(left.size());
    left.push_back(std::move(t));
  }
  for (DraftTensor& t : left) {
    if (t.record.alias != kNone) t.record.alias = number[t.record.alias];
  }
  d.tensors = std::move(left);
}

void drop_unnamed_planes(Draft& d) {
  std::vector<bool> named(d.planes.size());
  const auto name = [&](uint32_t plane) {
    if (plane != kNone) named[plane] = true;
  };
  for (const DraftTensor& t : d.tensors) {
    if (t.record.alias != kNone) continue;
    for (uint32_t plane : {t.record.base_plane, t.record.shared_plane, t.record.shared_scales_plane}) name(plane);
    for (const DraftEntry& e : t.entries) {
      name(e.record.plane);
      name(e.record.scales_plane);
    }
  }
  for (const auto& file : d.files) name(file.first.plane);
  for (size_t i = 0; i < named.size(); ++i) {
    if (!named[i]) d.planes[i].dropped = true;
  }
}

// Whether bytes [at, at + size) of a plane, which begin a checksum block, are right.
bool is_right(const Draft& d, const DraftPlane& plane, uint64_t at, const uint8_t* bytes, uint64_t size) {
  for (uint64_t b = 0; b < size; b += kSumBlock) {
    const uint64_t sum = plane.sums[(at + b) / kSumBlock];
    if (hash_block(*d.kernels, bytes + b, std::min(kSumBlock, size - b)) != sum) return false;
  }
  return true;
}

void sync(const Draft& d) {
  if (::fsync(d.fd) != 0) {
    throw Error(Status::Write, text(d.label, ": cannot be written to disk: ", std::strerror(errno)), errno);
  }
}

}  // namespace

void adopt(Draft& d, std::vector<uint32_t> kept, const std::vector<std::string>& more,
           const std::vector<std::string>& untied) {
  d.original = read_original(d.fd, d.label);
  d.original->kept = std::move(kept);
  const Index& index = d.original->index;
  require_known(d.label, index);
  d.kernels = &require_kernels();
  d.recipe.merge = index.header.merge;
  d.recipe.storage = index.header.base_storage;
  d.begin = d.end = d.original->slot.file_size;
  for (const PlaneRecord& record : index.planes) {
    const auto first = index.sums.begin() + static_cast<ptrdiff_t>(record.first_sum);
    const uint64_t size = record.coding == PlaneCoding::External ? record.raw_size : record.size;
    d.planes.push_back({record, {first, first + static_cast<ptrdiff_t>(sum_count(size))}, false});
  }
  for (uint32_t i = 0; i < index.tensors.size(); ++i) {
    const uint32_t alias = index.tensors[i].alias;
    std::string name(index.text(index.tensors[i].name));
    if (alias != kNone && std::count(untied.begin(), untied.end(), name)) {
      d.tensors.push_back(stored_tensor(d, alias));
      d.tensors.back().name = std::move(name);
      d.tensors.back().untied = true;
    } else {
      d.tensors.push_back(stored_tensor(d, i));
    }
  }
  for (const std::string& name : more) d.tensors.push_back(new_tensor(name));
  std::vector<uint32_t> order(d.tensors.size()), number(d.tensors.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return d.tensors[a].name < d.tensors[b].name; });
  std::vector<DraftTensor> sorted;
  for (uint32_t i : order) {
    number[i] = static_cast<uint32_t>(sorted.size());
    sorted.push_back(std::move(d.tensors[i]));
  }
  for (DraftTensor& t : sorted) {
    if (t.record.alias != kNone) t.record.alias = number[t.record.alias];
  }
  d.tensors = std::move(sorted);
}

void check_stored(const Draft& d, const Options& options) {
  struct Item {
    const DraftTensor* tensor;
    uint32_t plane;
    Source source;
    uint64_t at;
  };
  std::vector<Item> items;
  const auto add = [&](const DraftTensor& t, uint32_t plane, const Source& source) {
    if (plane == kNone || !source) return;
    for (uint64_t at = 0; at < d.planes[plane].record.raw_size; at += kCopyChunk) items.push_back({&t, plane, source, at});
  };
  for (const DraftTensor& t : d.tensors) {
    if (t.record.alias != kNone) continue;
    add(t, t.record.base_plane, t.base);
    for (uint32_t plane : {t.record.shared_plane, t.record.shared_scales_plane}) {
      if (plane != kNone) add(t, plane, d.source(plane));
    }
  }
  parallel_for(items.size(), options.threads, watch(options, "verifying"), [&](uint64_t i, unsigned) {
    const auto& [t, plane, source, at] = items[i];
    const DraftPlane& p = d.planes[plane];
    const uint64_t size = std::min(p.record.raw_size - at, kCopyChunk);
    std::vector<uint8_t> buffer;
    if (is_right(d, p, at, source.view(at, size, buffer), size)) return;
    const bool given = p.record.kind == PlaneKind::Base && (source.memory || source.fd != d.fd);
    if (given) {
      throw Error(Status::BaseMismatch, text(d.label, ": the base that was given is not the one the file was ",
                                             "encoded against: it differs in tensor '", t->name, "'"));
    }
    throw Error(Status::Checksum, text(d.label, ": damaged: wrong checksum in the base or the shared vector of tensor '",
                                       t->name, "'"));
  });
}

void read_shared(const Draft& d, const DraftTensor& t, uint64_t first, uint64_t n, float* s) {
  std::vector<uint8_t> values, scales;
  const uint64_t size = size_of(t.shared_dtype);
  const uint8_t* const stored = d.source(t.record.shared_plane).view(first * size, n * size, values);
  if (t.shared_dtype == DType::I8) {
    const uint8_t* const all = d.source(t.record.shared_scales_plane)
                                   .view(first / kScaleBlock * 4, (n + kScaleBlock - 1) / kScaleBlock * 4, scales);
    for (uint64_t i = 0; i < n; ++i) {
      float scale;
      std::memcpy(&scale, all + i / kScaleBlock * 4, sizeof scale);
      s[i] = dequantise(static_cast<int8_t>(stored[i]), scale);
    }
  } else {
    to_float32(stored, t.shared_dtype, n, s);
  }
  for (uint64_t i = 0; i < n; ++i) s[i] = shared_value(s[i]);
}

void join(Draft& d) {
  const Index& index = d.original->index;
  std::vector<DraftTask> tasks;
  for (uint32_t k : d.original->kept) {
    const TaskRecord& t = index.tasks[k];
    tasks.push_back({std::string(index.text(t.name)), t.threshold, t.method});
  }
  d.tasks.insert(d.tasks.begin(), tasks.begin(), tasks.end());
  for (DraftTensor& t : d.tensors) {
    std::vector<DraftEntry> entries;
    for (uint32_t k : d.original->kept) entries.push_back(stored_entry(d, t, k));
    t.entries.insert(t.entries.begin(), entries.begin(), entries.end());
    drop_shared(*d.original, t);
  }
  restore_side_data(d);
  drop_absent(d);
  drop_unnamed_planes(d);
}

std::vector<FreeRange> free_ranges(const Draft& d, std::vector<FreeRange> more) {
  if (d.original) {
    const Original& o = *d.original;
    more.insert(more.end(), o.index.free.begin(), o.index.free.end());
    more.push_back({o.slot.index_offset, o.slot.index_size});
  }
  std::sort(more.begin(), more.end(), [](const FreeRange& a, const FreeRange& b) { return a.offset < b.offset; });
  std::vector<FreeRange> free;
  for (const FreeRange& range : more) {
    if (!free.empty() && free.back().offset + free.back().size == range.offset) {
      free.back().size += range.size;
    } else {
      free.push_back(range);
    }
  }
  return free;
}

uint64_t commit(Draft& d, std::string_view index) {
  Original& o = *d.original;
  if (o.slot.sequence == UINT64_MAX) throw Error(Status::Format, text(d.label, ": has been changed too often"));
  const uint64_t file_size = d.end + index.size();
  d.write(index.data(), index.size(), d.end);
  d.resize(file_size);
  sync(d);  // what the slot will speak of is there before it does
  const size_t other = std::memcmp(&o.header.slot[0], &o.slot, sizeof o.slot) == 0;
  const Slot slot = make_slot(o.header, o.slot.sequence + 1, d.end, index, file_size);
  o.committing = true;
  write_all(d.fd, d.label, &slot, sizeof slot, offsetof(Header, slot) + other * sizeof slot);
  sync(d);
  return file_size;
}

void withdraw(const Draft& d) {
  if (!d.original || d.original->committing) return;
  // Where this fails, too, bytes are left that are ignored.
  [[maybe_unused]] const int ignored = ::ftruncate(d.fd, static_cast<off_t>(d.original->slot.file_size));
}

uint64_t compact(int from, int to, std::string label, std::string writer, const Options& options) {
  Draft d;
  d.fd = from;
  d.label = std::move(label);
  d.writer = std::move(writer);
  adopt(d, {}, {}, {});
  Original& o = *d.original;
  o.kept.resize(o.index.tasks.size());
  std::iota(o.kept.begin(), o.kept.end(), 0);
  join(d);
  d.recipe.scale = o.index.header.scale;

  // Planes move up in the order in which they are.
  struct Item {
    uint32_t plane;
    uint64_t from, at;
  };
  std::vector<Item> items;
  d.end = sizeof(Header);
  for (uint32_t id = 0; id < d.planes.size(); ++id) {
    DraftPlane& p = d.planes[id];
    if (p.dropped) p.record.size = 0;  // not even a free range
    if (p.dropped || p.record.coding == PlaneCoding::External) continue;
    for (uint64_t at = 0; at < p.record.size; at += kCopyChunk) items.push_back({id, p.record.offset, at});
    p.record.offset = d.end;
    d.end += align64(p.record.size);
  }
  d.original.reset();
  d.begin = 0;
  d.fd = to;
  parallel_for(items.size(), options.threads, watch(options, "compacting"), [&](uint64_t i, unsigned) {
    const auto& [id, offset, at] = items[i];
    const DraftPlane& p = d.planes[id];
    const uint64_t size = std::min(align64(p.record.size) - at, kCopyChunk);
    std::vector<uint8_t> buffer;
    const uint8_t* const bytes = Source{nullptr, from, offset}.view(at, size, buffer);
    if (!is_right(d, p, at, bytes, size)) {
      throw Error(Status::Checksum, text(d.label, ": damaged: wrong checksum in plane ", id,
                                         ", which verify tells the name of"));
    }
    d.write(bytes, size, p.record.offset + at);
  });
  return d.finish();
}

}  // namespace tallcodec
