// Planes, where they go, and the index that names them.
#include "draft.h"

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "text.h"

namespace tallcodec {

void Draft::place() {
  bool embed = recipe.storage == BaseStorage::Embedded;
  for (DraftTensor& t : tensors) {
    uint64_t size = t.elements() * size_of(t.record.dtype);
    if (t.is_stored() || !t.record.in_base || t.record.alias != kNone || !size) continue;
    t.record.base_plane =
        embed ? reserve(PlaneKind::Base, size)
              : reserve(PlaneKind::Base, PlaneCoding::External, 0, size);
  }
  for (DraftTensor& t : tensors) {
    if (t.is_stored() || t.coded().empty()) continue;
    t.record.shared_dtype = t.shared_dtype;
    t.record.shared_plane = reserve(PlaneKind::Shared, t.elements() * size_of(t.shared_dtype));
    if (t.shared_dtype == DType::I8) {
      uint64_t blocks = (t.elements() + kScaleBlock - 1) / kScaleBlock;
      t.record.shared_scales_plane = reserve(PlaneKind::Scales, blocks * 4);
    }
  }
  masks = end;
  for (uint32_t k = 0; k < tasks.size(); ++k) {
    for (DraftTensor& t : tensors) {
      EntryRecord& e = t.entries[k].record;
      if (e.coding != Coding::Mask) continue;
      e.plane = reserve(PlaneKind::Mask, (t.elements() + 7) / 8);
      if (recipe.scale == ScaleMode::UnitGainRow) e.scales_plane = reserve(PlaneKind::Scales, t.rows() * 4);
    }
  }
}

uint32_t Draft::reserve(PlaneKind kind, PlaneCoding coding, uint64_t size, uint64_t raw_size) {
  DraftPlane plane;
  plane.record.kind = kind;
  plane.record.coding = coding;
  plane.record.raw_size = raw_size;
  if (coding != PlaneCoding::External) {
    plane.record.offset = end;
    plane.record.size = size;
    end += align64(size);
  }
  plane.sums.resize(sum_count(coding == PlaneCoding::External ? raw_size : size));
  planes.push_back(std::move(plane));
  return static_cast<uint32_t>(planes.size() - 1);
}

void Draft::put(uint32_t id, uint64_t position, const void* data, uint64_t size) {
  DraftPlane& plane = planes[id];
  auto bytes = static_cast<const uint8_t*>(data);
  uint64_t* sum = &plane.sums[position / kSumBlock];
  for (uint64_t at = 0; at < size; at += kSumBlock) {
    *sum++ = hash_block(*kernels, bytes + at, std::min(kSumBlock, size - at));
  }
  if (plane.record.coding != PlaneCoding::External) {
    write(data, size, plane.record.offset + position);
  }
}

namespace {

// Runs visit(block, sum) on the checksum blocks of `size` bytes of a plane, as they are in the file.
template <class Visit>
void for_each_sum(const Draft& d, const PlaneRecord& plane, uint64_t size, Visit visit) {
  const Source source{nullptr, d.fd, plane.offset};
  std::vector<uint8_t> buffer;
  for (uint64_t at = 0; at < size; at += kSumBlock) {
    const uint64_t part = std::min(kSumBlock, size - at);
    visit(at / kSumBlock, hash_block(*d.kernels, source.view(at, part, buffer), part));
  }
}

}  // namespace

void Draft::sum(uint32_t id) {
  DraftPlane& plane = planes[id];
  for_each_sum(*this, plane.record, plane.record.size, [&](uint64_t block, uint64_t sum) { plane.sums[block] = sum; });
}

bool Draft::intact(const DraftPlane& plane) const {
  bool same = plane.sums.size() == sum_count(plane.record.size);
  try {
    for_each_sum(*this, plane.record, align64(plane.record.size), [&](uint64_t block, uint64_t sum) {
      same = same && plane.sums[block] == sum;
    });
  } catch (const Error&) {  // the file is too short
    return false;
  }
  return same;
}

void Draft::copy(uint64_t from, uint64_t to, uint64_t size) const {
  std::vector<uint8_t> buffer;
  for (uint64_t at = 0; at < size; at += kCopyChunk) {
    const uint64_t part = std::min(size - at, kCopyChunk);
    Source{nullptr, fd, from}.view(at, part, buffer);
    buffer.resize(part);
    buffer.resize(align64(part));
    write(buffer.data(), buffer.size(), to + at);
  }
}

uint32_t Draft::append(PlaneKind kind, PlaneCoding coding, std::string_view bytes, uint64_t raw_size) {
  if (bytes.empty()) return kNone;
  uint32_t id = reserve(kind, coding, bytes.size(), raw_size);
  put(id, 0, bytes.data(), bytes.size());
  return id;
}

void Draft::resize(uint64_t size) const {
  if (::ftruncate(fd, static_cast<off_t>(size)) != 0) {
    throw Error(Status::Write, text(label, ": cannot be given its size: ", std::strerror(errno)), errno);
  }
}

void Draft::truncate(uint64_t begin, uint64_t size) {
  resize(size);
  end = size;
  for (DraftPlane& p : planes) {
    if (p.dropped && p.record.offset >= begin) p.record.size = 0;
  }
}

void Draft::drop(uint32_t& plane) {
  if (plane != kNone) planes[plane].dropped = true;
  plane = kNone;
}

void Draft::leave_out(EntryRecord& e, bool base_nonfinite) {
  e.coding = Coding::Verbatim;
  e.reason = base_nonfinite ? Reason::NonfiniteBase : Reason::NonfiniteTask;
  e.factor = 0;
  drop(e.plane);
  drop(e.scales_plane);
}

bool Draft::leave_out(DraftTensor& t, bool base_nonfinite, const std::vector<uint8_t>& nonfinite) {
  bool any = false;
  const std::vector<uint32_t> coded = t.coded();
  for (size_t k = 0; k < coded.size(); ++k) {
    if (!base_nonfinite && !nonfinite[k]) continue;
    leave_out(t.entries[coded[k]].record, base_nonfinite);
    any = true;
  }
  if (t.coded().empty() && !t.is_stored()) {
    t.record.shared_dtype = DType{};
    drop(t.record.shared_plane);
    drop(t.record.shared_scales_plane);
  }
  return any;
}

// Dropped planes hold what was found to be of no use: the same file must come out for the same input.
void Draft::clear(uint64_t offset, uint64_t size) const {
  std::vector<uint8_t> zeros(std::min(size, kSumBlock));
  for (uint64_t done = 0; done < size; done += zeros.size()) {
    write(zeros.data(), std::min<uint64_t>(zeros.size(), size - done), offset + done);
  }
}

void Draft::write(const void* data, uint64_t size, uint64_t offset) const {
  if (offset < begin) throw Error(Status::Write, text(label, ": would be written over"));
  write_all(fd, label, data, size, offset);
}

uint64_t Draft::finish() {
  if (original) join(*this);
  Index index;
  auto string = [&](const std::string& s) {
    if (index.strings.size() + s.size() > UINT32_MAX) {
      throw Error(Status::Argument, "names and metadata together are larger than 4 GiB");
    }
    StringRef ref{static_cast<uint32_t>(index.strings.size()), static_cast<uint32_t>(s.size())};
    index.strings += s;
    return ref;
  };
  auto dims = [&](const std::vector<uint64_t>& shape) {
    auto first = static_cast<uint32_t>(shape.empty() ? 0 : index.dims.size());
    index.dims.insert(index.dims.end(), shape.begin(), shape.end());
    return first;
  };

  // Planes are numbered as they lie in the file, external ones last; dropped ones become free ranges.
  std::vector<uint32_t> number(planes.size(), kNone);
  for (bool external : {false, true}) {
    for (size_t i = 0; i < planes.size(); ++i) {
      DraftPlane& p = planes[i];
      if (p.dropped || (p.record.coding == PlaneCoding::External) != external) continue;
      number[i] = static_cast<uint32_t>(index.planes.size());
      p.record.first_sum = index.sums.size();
      index.sums.insert(index.sums.end(), p.sums.begin(), p.sums.end());
      index.planes.push_back(p.record);
    }
  }
  auto numbered = [&](uint32_t plane) { return plane == kNone ? kNone : number[plane]; };
  std::vector<FreeRange> free;
  for (const DraftPlane& p : planes) {
    if (!p.dropped || !p.record.size) continue;
    uint64_t size = align64(p.record.size);
    if (p.record.offset >= begin) clear(p.record.offset, size);  // others may still be read
    free.push_back({p.record.offset, size});
  }
  index.free = free_ranges(*this, std::move(free));

  index.header.writer = string(writer);
  index.header.base_storage = recipe.storage;
  index.header.merge = recipe.merge;
  index.header.scale = original ? original->index.header.scale : recipe.scale;
  for (const DraftTensor& t : tensors) {
    TensorRecord r = t.record;
    r.name = string(t.name);
    r.dims = dims(t.shape);
    r.base_plane = numbered(r.base_plane);
    r.shared_plane = numbered(r.shared_plane);
    r.shared_scales_plane = numbered(r.shared_scales_plane);
    r.count_count = static_cast<uint32_t>(t.counts.size());
    r.first_count = static_cast<uint32_t>(t.counts.empty() ? 0 : index.counts.size());
    index.counts.insert(index.counts.end(), t.counts.begin(), t.counts.end());
    index.tensors.push_back(r);
  }
  for (const DraftTask& task : tasks) {
    TaskRecord r{};
    r.name = string(task.name);
    r.threshold = task.threshold;
    r.method = task.method;
    index.tasks.push_back(r);
  }
  for (uint32_t k = 0; k < tasks.size(); ++k) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const DraftEntry& e = tensors[i].entries[k];
      EntryRecord r = e.record;
      if (tensors[i].record.alias == kNone && r.coding != Coding::Absent) {
        r.dims = r.coding == Coding::Verbatim ? dims(e.shape) : index.tensors[i].dims;
        r.plane = numbered(r.plane);
        r.scales_plane = numbered(r.scales_plane);
      }
      index.entries.push_back(r);
    }
  }
  auto scope_order = [](uint32_t scope) {
    return scope == kScopeFile ? int64_t{-2} : scope == kScopeBase ? int64_t{-1} : int64_t{scope};
  };
  std::sort(files.begin(), files.end(), [&](const auto& a, const auto& b) {
    return std::make_pair(scope_order(a.first.scope), std::string_view(a.second)) <
           std::make_pair(scope_order(b.first.scope), std::string_view(b.second));
  });
  std::sort(metas.begin(), metas.end(), [&](const auto& a, const auto& b) {
    return std::make_pair(scope_order(a.scope), std::string_view(a.key)) <
           std::make_pair(scope_order(b.scope), std::string_view(b.key));
  });
  for (auto& [record, name] : files) {
    index.files.push_back({record.scope, numbered(record.plane), string(name)});
  }
  for (const auto& meta : metas) {
    MetaRecord r{};
    r.scope = meta.scope;
    r.key = string(meta.key);
    r.value = string(meta.value);
    index.metas.push_back(r);
  }

  if (std::max({index.dims.size(), index.counts.size(), planes.size()}) >= kNone) {
    throw Error(Status::Argument, text(label, ": too many tensors and tasks for one file"));
  }
  std::string bytes = write_index(index);
  if (original) return commit(*this, bytes);
  uint64_t file_size = end + bytes.size();
  Header header = write_header(end, bytes, file_size);
  write(bytes.data(), bytes.size(), end);
  write(&header, sizeof header, 0);
  return file_size;
}

namespace {

// Whether a byte of a file is in the page cache, as far as it can be told without waiting for it.
bool is_cached(int fd, uint64_t position) {
  char byte;
  const iovec to{&byte, 1};
  return ::preadv2(fd, &to, 1, static_cast<off_t>(position), RWF_NOWAIT) == 1;
}

// Runs visit(file descriptor, position, size) on what some units, to the one that is read, are in the files.
template <class Visit>
void for_each_range(const Reading& r, uint64_t first_unit, Visit visit) {
  const uint64_t first = first_unit * kUnit, n = std::min((r.unit + 1) * kUnit, r.tensor.elements()) - first;
  const auto range = [&](const Source& source, DType dtype) {
    if (source.fd >= 0) visit(source.fd, source.offset + first * size_of(dtype), n * size_of(dtype));
  };
  range(r.tensor.base, r.tensor.record.dtype);
  for (uint32_t k : r.tasks) range(r.tensor.entries[k].source, r.tensor.entries[k].record.dtype);
}

}  // namespace

// These are only hints: where they cannot be followed, nothing is lost.

void Reading::will_be() const {
  for_each_range(*this, unit, [](int fd, uint64_t position, uint64_t size) {
    if (is_cached(fd, position + size - 1)) return;
    ::posix_fadvise(fd, static_cast<off_t>(position), static_cast<off_t>(size), POSIX_FADV_WILLNEED);
  });
}

void Reading::has_been() const {
  // The cache keeps what units share, so in the end all of them are named.
  const uint64_t first = unit + 1 == tensor.units() ? 0 : unit;
  for_each_range(*this, first, [](int fd, uint64_t position, uint64_t size) {
    const uint64_t before = position % 4096;  // of a page that the tensor before has begun
    ::posix_fadvise(fd, static_cast<off_t>(position - before), static_cast<off_t>(size + before),
                    POSIX_FADV_DONTNEED);
  });
}

std::string who(const Draft& d, const DraftTensor& t, uint32_t task) {
  return task == kNone ? text("base, tensor '", t.name, "'")
                       : text("task '", d.tasks[task].name, "', tensor '", t.name, "'");
}

const uint8_t* elements_of(const Draft& d, const DraftTensor& t, uint32_t task, uint64_t first, uint64_t n,
                           std::vector<uint8_t>& buffer) {
  const bool is_base = task == kNone;
  const Source& source = is_base ? t.base : t.entries[task].source;
  const uint64_t size = size_of(is_base ? t.record.dtype : t.entries[task].record.dtype);
  try {
    return source.view(first * size, n * size, buffer);
  } catch (const Error& e) {
    throw Error(e.status, text(who(d, t, task), ": ", e.message), e.system_error);
  }
}

void Values::open(const Draft& draft, const DraftTensor& tensor) {
  draft_ = &draft;
  tensor_ = &tensor;
  tasks_ = draft.read_tasks(tensor);
  task.resize(tasks_.size());
  dtype.clear();
  for (uint32_t k : tasks_) dtype.push_back(tensor.entries[k].record.dtype);
  task_buffer_.resize(std::max(task_buffer_.size(), tasks_.size()));
}

void Values::read(uint64_t first, uint64_t n) {
  base = elements_of(*draft_, *tensor_, kNone, first, n, base_buffer_);
  for (size_t k = 0; k < tasks_.size(); ++k) {
    task[k] = elements_of(*draft_, *tensor_, tasks_[k], first, n, task_buffer_[k]);
  }
}

}  // namespace tallcodec
