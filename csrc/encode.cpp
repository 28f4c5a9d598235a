// Plan and kernels to planes.
#include "encode.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <mutex>
#include <numeric>

#include "parallel.h"
#include "text.h"

namespace tallcodec {
namespace {

constexpr uint64_t kCopyChunk = 32 * kSumBlock;  // bytes of a plane that is only copied, at a time

struct Plane {
  PlaneRecord record{};
  std::vector<uint64_t> sums;
  bool dropped = false;
};

struct Entry {
  EntryRecord record{};
  std::vector<uint64_t> shape;
  Source source;
};

struct Tensor {
  std::string name;
  TensorRecord record{};
  std::vector<uint64_t> shape;
  DType shared_dtype{};  // what a shared vector will have, if there is one
  Source base;
  std::vector<Entry> entries;  // one per task
  std::vector<uint64_t> counts;

  uint64_t elements() const {
    return std::accumulate(shape.begin(), shape.end(), uint64_t{1}, std::multiplies<>());
  }
  uint64_t rows() const { return shape.size() < 2 ? 1 : shape[0]; }
  std::vector<uint32_t> coded() const {
    std::vector<uint32_t> tasks;
    for (uint32_t k = 0; k < entries.size(); ++k) {
      if (entries[k].record.coding == Coding::Mask) tasks.push_back(k);
    }
    return tasks;
  }
};

// The three statistics of a range of elements.
struct Moments {
  double tau_sq = 0, dot = 0, approx_sq = 0;

  void add(const Moments& m) {
    tau_sq += m.tau_sq;
    dot += m.dot;
    approx_sq += m.approx_sq;
  }
};

double add_lanes(const double* lanes) {
  double sum[kLanes];
  std::copy(lanes, lanes + kLanes, sum);
  for (uint32_t half = kLanes / 2; half; half /= 2) {
    for (uint32_t i = 0; i < half; ++i) sum[i] += sum[i + half];
  }
  return sum[0];
}

Moments moments(const Sums& s) {
  return {add_lanes(s.tau_sq), add_lanes(s.dot), add_lanes(s.approx_sq)};
}

// The scale that makes the gain 1, and what it makes of the moments.
float unit_gain(const Moments& m) {
  float g = static_cast<float>(m.tau_sq / m.dot);
  return g > 0 && std::isnormal(g) ? g : 1.0f;
}

Moments scaled(const Moments& m, float scale) {
  double g = scale;
  return {m.tau_sq, g * m.dot, (g * m.approx_sq) * g};
}

// What the units of one coded tensor leave for its end, when they can be put in order.
struct Progress {
  explicit Progress(const Tensor& t, bool per_row)
      : tasks(t.coded()),
        units((t.elements() + kUnit - 1) / kUnit),
        rows(per_row ? t.rows() : 1),
        row_length(t.elements() / rows),
        segments(tasks.size() * units),
        set_bits(tasks.size()),
        published_bits(tasks.size()),
        counts(tasks.size() + 1),
        nonfinite(tasks.size()) {
    if (t.shared_dtype == DType::I8) {
      shared_scales.resize((t.elements() + kScaleBlock - 1) / kScaleBlock);
    }
  }

  std::vector<uint32_t> tasks;  // those coded, in task order
  uint64_t units, rows, row_length;
  std::vector<std::vector<Moments>> segments;  // [task * units + unit]: those of the unit, in order
  std::vector<float> shared_scales;
  std::mutex mutex;  // what follows is order-free and shared by the threads
  std::vector<uint64_t> set_bits, published_bits, counts;
  std::vector<uint8_t> nonfinite;
  bool base_nonfinite = false;
};

}  // namespace

struct Encoder::Draft {
  int fd = -1;
  std::string label;
  std::string writer;
  ScaleMode scale{};
  BaseStorage storage{};
  std::vector<std::pair<std::string, float>> tasks;
  std::vector<Tensor> tensors;
  std::vector<Plane> planes;
  std::vector<std::pair<FileRecord, std::string>> files;
  struct Meta {
    uint32_t scope;
    std::string key, value;
  };
  std::vector<Meta> metas;
  uint64_t end = sizeof(Header);
  const Kernels* kernels = nullptr;

  std::string who(const Tensor& t, uint32_t task = kNone) const {
    return task == kNone ? text("base, tensor '", t.name, "'")
                         : text("task '", tasks[task].first, "', tensor '", t.name, "'");
  }

  void write(const void* data, uint64_t size, uint64_t offset) const {
    for (uint64_t done = 0; done < size;) {
      ssize_t put = ::pwrite(fd, static_cast<const uint8_t*>(data) + done, size - done,
                             static_cast<off_t>(offset + done));
      if (put >= 0) {
        done += static_cast<uint64_t>(put);
      } else if (errno != EINTR) {
        throw Error(Status::Write, text(label, ": cannot write: ", std::strerror(errno)), errno);
      }
    }
  }

  uint32_t reserve(PlaneKind kind, PlaneCoding coding, uint64_t size, uint64_t raw_size) {
    Plane plane;
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
  uint32_t reserve(PlaneKind kind, uint64_t size) {
    return reserve(kind, PlaneCoding::Raw, size, size);
  }

  // Checksums and writes a part of a plane that begins at a checksum block. All but the plane's last part
  // is whole blocks. Not on `data`, which may be mapped read-only: a short end is copied to be padded.
  void put(uint32_t id, uint64_t position, const void* data, uint64_t size) {
    Plane& plane = planes[id];
    auto bytes = static_cast<const uint8_t*>(data);
    uint64_t whole = size / kSumBlock * kSumBlock;
    uint64_t* sum = &plane.sums[position / kSumBlock];
    for (uint64_t at = 0; at < whole; at += kSumBlock) *sum++ = kernels->hash(bytes + at, kSumBlock);
    if (whole < size) {
      std::vector<uint8_t> end(align64(size - whole));
      std::memcpy(end.data(), bytes + whole, size - whole);
      *sum = kernels->hash(end.data(), end.size());
    }
    if (plane.record.coding != PlaneCoding::External) {
      write(data, size, plane.record.offset + position);
    }
  }

  uint32_t append(PlaneKind kind, PlaneCoding coding, std::string_view bytes, uint64_t raw_size) {
    if (bytes.empty()) return kNone;
    uint32_t id = reserve(kind, coding, bytes.size(), raw_size);
    put(id, 0, bytes.data(), bytes.size());
    return id;
  }

  void place();
  void copy_base(const Tensor& t, uint64_t chunk, std::vector<uint8_t>& buffer);
  struct Buffers;
  void encode_unit(const Tensor& t, Progress& progress, uint64_t unit, Buffers& buffers);
  std::vector<Moments> row_segments(const Progress& progress, uint64_t first,
                                    const EncodeBlock& unit, uint32_t k,
                                    const Buffers& buffers) const;
  bool settle(Tensor& t, Progress& progress);
  void drop(uint32_t& plane) {
    if (plane != kNone) planes[plane].dropped = true;
    plane = kNone;
  }
};

// What a thread keeps from unit to unit.
struct Encoder::Draft::Buffers {
  std::vector<uint8_t> base, shared;
  std::vector<std::vector<uint8_t>> task, mask;
};

void Encoder::Draft::place() {
  bool embed = storage == BaseStorage::Embedded;
  for (Tensor& t : tensors) {
    uint64_t size = t.elements() * size_of(t.record.dtype);
    if (!t.record.in_base || t.record.alias != kNone || !size) continue;
    t.record.base_plane =
        embed ? reserve(PlaneKind::Base, size)
              : reserve(PlaneKind::Base, PlaneCoding::External, 0, size);
  }
  for (Tensor& t : tensors) {
    if (t.coded().empty()) continue;
    t.record.shared_dtype = t.shared_dtype;
    t.record.shared_plane = reserve(PlaneKind::Shared, t.elements() * size_of(t.shared_dtype));
    if (t.shared_dtype == DType::I8) {
      uint64_t blocks = (t.elements() + kScaleBlock - 1) / kScaleBlock;
      t.record.shared_scales_plane = reserve(PlaneKind::Scales, blocks * 4);
    }
  }
  for (uint32_t k = 0; k < tasks.size(); ++k) {
    for (Tensor& t : tensors) {
      EntryRecord& e = t.entries[k].record;
      if (e.coding != Coding::Mask) continue;
      e.plane = reserve(PlaneKind::Mask, (t.elements() + 7) / 8);
      if (scale == ScaleMode::UnitGainRow) e.scales_plane = reserve(PlaneKind::Scales, t.rows() * 4);
    }
  }
}

void Encoder::Draft::copy_base(const Tensor& t, uint64_t chunk, std::vector<uint8_t>& buffer) {
  uint64_t position = chunk * kCopyChunk;
  uint64_t left = t.elements() * size_of(t.record.dtype) - position;
  uint64_t size = std::min(left, kCopyChunk);
  try {
    put(t.record.base_plane, position, t.base.view(position, size, buffer), size);
  } catch (const Error& e) {
    if (e.status != Status::Read) throw;
    throw Error(e.status, text(who(t), ": ", e.message), e.system_error);
  }
}

void Encoder::Draft::encode_unit(const Tensor& t, Progress& progress, uint64_t unit,
                                 Buffers& buffers) {
  const auto& coded = progress.tasks;
  const auto count = static_cast<uint32_t>(coded.size());
  const uint64_t first = unit * kUnit, n = std::min(kUnit, t.elements() - first);
  const uint32_t base_size = size_of(t.record.dtype), shared_size = size_of(t.shared_dtype);
  // As many elements at a time as fill a checksum block of the base: the buffers of a few tasks then
  // stay in cache from read to kernel. Scales per row look at a unit's values once more, so they keep it whole.
  const uint64_t step = scale == ScaleMode::UnitGainRow ? kUnit : kSumBlock / base_size;

  buffers.shared.resize(kUnit * shared_size);
  buffers.task.resize(std::max<size_t>(buffers.task.size(), count));
  buffers.mask.resize(std::max<size_t>(buffers.mask.size(), count));

  std::vector<const void*> values(count);
  std::vector<DType> dtypes(count);
  std::vector<float> thresholds(count);
  std::vector<uint8_t*> masks(count);
  std::vector<TaskStats> stats(count);
  std::vector<uint64_t> agreement(count + 1);
  for (uint32_t k = 0; k < count; ++k) {
    dtypes[k] = t.entries[coded[k]].record.dtype;
    thresholds[k] = tasks[coded[k]].second;
    buffers.mask[k].resize(kUnit / 8);
  }

  EncodeBlock block{};
  block.tasks = count;
  block.base_dtype = t.record.dtype;
  block.task = values.data();
  block.task_dtype = dtypes.data();
  block.threshold = thresholds.data();
  block.shared_dtype = t.shared_dtype;
  block.mask = masks.data();
  block.stats = stats.data();
  block.agreement = agreement.data();

  for (uint64_t at = 0; at < n; at += step) {
    block.n = std::min(step, n - at);
    uint32_t reading = kNone;
    try {
      block.base = t.base.view((first + at) * base_size, block.n * base_size, buffers.base);
      for (uint32_t k = 0; k < count; ++k) {
        reading = coded[k];
        uint32_t size = size_of(dtypes[k]);
        values[k] = t.entries[reading].source.view((first + at) * size, block.n * size,
                                                   buffers.task[k]);
      }
    } catch (const Error& e) {
      throw Error(e.status, text(who(t, reading), ": ", e.message), e.system_error);
    }
    for (uint32_t k = 0; k < count; ++k) masks[k] = buffers.mask[k].data() + at / 8;
    block.shared = buffers.shared.data() + at * shared_size;
    if (t.shared_dtype == DType::I8) {
      block.shared_scales = progress.shared_scales.data() + (first + at) / kScaleBlock;
    }
    kernels->encode(block);
    put(t.record.base_plane, (first + at) * base_size, block.base, block.n * base_size);
  }
  put(t.record.shared_plane, first * shared_size, buffers.shared.data(), n * shared_size);
  for (uint32_t k = 0; k < count; ++k) {
    put(t.entries[coded[k]].record.plane, first / 8, buffers.mask[k].data(), (n + 7) / 8);
  }

  for (uint32_t k = 0; k < count; ++k) {
    auto& segments = progress.segments[k * progress.units + unit];
    if (scale == ScaleMode::UnitGainRow) {
      segments = row_segments(progress, first, block, k, buffers);
    } else {
      segments = {moments(stats[k].sums)};
    }
  }
  std::lock_guard lock(progress.mutex);
  progress.base_nonfinite |= block.base_nonfinite;
  for (uint32_t k = 0; k < count; ++k) {
    progress.set_bits[k] += stats[k].set_bits;
    progress.published_bits[k] += stats[k].published_bits;
    progress.nonfinite[k] |= stats[k].nonfinite;
  }
  for (uint32_t k = 0; k <= count; ++k) progress.counts[k] += agreement[k];
}

// The moments of the parts of rows within a unit that was encoded in one block.
std::vector<Moments> Encoder::Draft::row_segments(const Progress& progress, uint64_t first,
                                                  const EncodeBlock& unit, uint32_t k,
                                                  const Buffers& buffers) const {
  std::vector<Moments> segments;
  const auto at_element = [](const void* p, DType type, uint64_t i) {
    return static_cast<const uint8_t*>(p) + i * size_of(type);
  };
  for (uint64_t at = 0; at < unit.n;) {
    uint64_t row_end = ((first + at) / progress.row_length + 1) * progress.row_length - first;
    uint64_t end = std::min(row_end, unit.n), aligned = at / kScaleBlock * kScaleBlock;
    DecodeBlock part{};
    part.n = end - at;
    part.phase = static_cast<uint32_t>(at - aligned);
    part.base = at_element(unit.base, unit.base_dtype, at);
    part.base_dtype = unit.base_dtype;
    part.shared = at_element(unit.shared, unit.shared_dtype, at);
    part.shared_dtype = unit.shared_dtype;
    if (unit.shared_scales) part.shared_scales = unit.shared_scales + aligned / kScaleBlock;
    part.mask = buffers.mask[k].data() + aligned / 8;
    part.scale = 1;
    Sums sums{};
    kernels->sums(part, at_element(unit.task[k], unit.task_dtype[k], at), unit.task_dtype[k], sums);
    segments.push_back(moments(sums));
    at = end;
  }
  return segments;
}

// Fills in a coded tensor's entries once all its units are done. True: NaN or infinity turned up in
// some task, which is verbatim now, and the others are to be encoded again without it.
bool Encoder::Draft::settle(Tensor& t, Progress& progress) {
  bool again = false;
  for (size_t k = 0; k < progress.tasks.size(); ++k) {
    if (!progress.base_nonfinite && !progress.nonfinite[k]) continue;
    EntryRecord& e = t.entries[progress.tasks[k]].record;
    e.coding = Coding::Verbatim;
    e.reason = progress.base_nonfinite ? Reason::NonfiniteBase : Reason::NonfiniteTask;
    drop(e.plane);
    drop(e.scales_plane);
    again = true;
  }
  if (t.coded().empty()) {
    t.record.shared_dtype = DType{};
    drop(t.record.shared_plane);
    drop(t.record.shared_scales_plane);
    return false;
  }
  if (again) return true;

  for (size_t k = 0; k < progress.tasks.size(); ++k) {
    std::vector<Moments> rows(progress.rows);
    uint64_t element = 0;
    for (uint64_t unit = 0; unit < progress.units; ++unit) {
      for (const Moments& m : progress.segments[k * progress.units + unit]) {
        rows[element / progress.row_length].add(m);
        uint64_t row_end = (element / progress.row_length + 1) * progress.row_length;
        element = std::min({row_end, (unit + 1) * kUnit});
      }
    }
    std::vector<float> scales;
    Moments total;
    for (const Moments& row : rows) {
      scales.push_back(scale == ScaleMode::None ? 1.0f : unit_gain(row));
      total.add(scaled(row, scales.back()));
    }
    EntryRecord& e = t.entries[progress.tasks[k]].record;
    if (e.scales_plane != kNone) {
      put(e.scales_plane, 0, scales.data(), scales.size() * sizeof(float));
    } else {
      e.scale = scales[0];
    }
    e.set_bits = progress.set_bits[k];
    e.published_bits = progress.published_bits[k];
    e.tau_sq = total.tau_sq;
    e.dot = total.dot;
    e.approx_sq = total.approx_sq;
  }
  if (t.shared_dtype == DType::I8) {
    put(t.record.shared_scales_plane, 0, progress.shared_scales.data(),
        progress.shared_scales.size() * sizeof(float));
  }
  t.counts = progress.counts;
  return false;
}

Encoder::Encoder(int fd, std::string label, std::string writer, ScaleMode scale,
                 BaseStorage storage)
    : draft_(std::make_unique<Draft>()) {
  draft_->fd = fd;
  draft_->label = std::move(label);
  draft_->writer = std::move(writer);
  draft_->scale = scale;
  draft_->storage = storage;
}
Encoder::~Encoder() = default;

uint32_t Encoder::add_task(std::string name, float threshold) {
  draft_->tasks.emplace_back(std::move(name), threshold);
  return static_cast<uint32_t>(draft_->tasks.size() - 1);
}

uint32_t Encoder::add_tensor(std::string name, bool in_base, DType dtype,
                             std::vector<uint64_t> shape, DType shared_dtype, Source base,
                             uint32_t alias) {
  Tensor t;
  t.name = std::move(name);
  t.shape = std::move(shape);
  t.shared_dtype = shared_dtype;
  t.base = base;
  t.record.in_base = in_base;
  t.record.dtype = dtype;
  t.record.rank = static_cast<uint8_t>(t.shape.size());
  t.record.base_plane = t.record.shared_plane = t.record.shared_scales_plane = kNone;
  t.record.alias = alias;
  t.entries.resize(draft_->tasks.size());
  for (Entry& e : t.entries) {
    if (alias != kNone) continue;
    e.record.coding = Coding::Absent;
    e.record.plane = e.record.scales_plane = kNone;
  }
  draft_->tensors.push_back(std::move(t));
  return static_cast<uint32_t>(draft_->tensors.size() - 1);
}

void Encoder::set_entry(uint32_t task, uint32_t tensor, Coding coding, DType dtype,
                        std::vector<uint64_t> shape, Reason reason, Source source) {
  Entry& e = draft_->tensors.at(tensor).entries.at(task);
  e.record.coding = coding;
  e.record.dtype = dtype;
  e.record.rank = static_cast<uint8_t>(shape.size());
  e.record.reason = reason;
  e.record.scale = 1;
  e.shape = std::move(shape);
  e.source = source;
}

void Encoder::run(const Options& options) {
  Draft& d = *draft_;
  d.kernels = options.kernels ? options.kernels : find_kernels();
  d.place();

  struct Item {
    uint32_t tensor;
    uint64_t part;  // a unit of a coded tensor, a chunk of one that is only copied
  };
  std::vector<Item> items;
  std::vector<uint32_t> coded;
  std::vector<std::unique_ptr<Progress>> progress(d.tensors.size());
  std::vector<Draft::Buffers> buffers(options.threads);

  for (uint32_t i = 0; i < d.tensors.size(); ++i) {
    const Tensor& t = d.tensors[i];
    if (!t.coded().empty()) {
      coded.push_back(i);
    } else if (t.record.base_plane != kNone) {
      uint64_t size = t.elements() * size_of(t.record.dtype);
      for (uint64_t c = 0; c * kCopyChunk < size; ++c) items.push_back({i, c});
    }
  }
  for (;;) {
    for (uint32_t i : coded) {
      progress[i] = std::make_unique<Progress>(d.tensors[i], d.scale == ScaleMode::UnitGainRow);
      for (uint64_t u = 0; u < progress[i]->units; ++u) items.push_back({i, u});
    }
    parallel_for(items.size(), options.threads, options.poll, [&](uint64_t item, unsigned worker) {
      auto [tensor, part] = items[item];
      const Tensor& t = d.tensors[tensor];
      if (progress[tensor]) {
        d.encode_unit(t, *progress[tensor], part, buffers[worker]);
      } else {
        d.copy_base(t, part, buffers[worker].base);
      }
    });
    items.clear();
    std::vector<uint32_t> again;
    for (uint32_t i : coded) {
      if (d.settle(d.tensors[i], *progress[i])) again.push_back(i);
      progress[i].reset();
    }
    if (again.empty()) return;
    coded = std::move(again);
  }
}

std::vector<Encoder::Pending> Encoder::verbatim() const {
  std::vector<Pending> pending;
  for (uint32_t k = 0; k < draft_->tasks.size(); ++k) {
    for (uint32_t i = 0; i < draft_->tensors.size(); ++i) {
      const Tensor& t = draft_->tensors[i];
      if (t.record.alias == kNone && t.entries[k].record.coding == Coding::Verbatim) {
        pending.push_back({k, i});
      }
    }
  }
  return pending;
}

void Encoder::append_verbatim(uint32_t task, uint32_t tensor, PlaneCoding coding,
                              std::string_view bytes, uint64_t raw_size) {
  draft_->tensors.at(tensor).entries.at(task).record.plane =
      draft_->append(PlaneKind::Verbatim, coding, bytes, raw_size);
}

uint32_t Encoder::append_file_plane(PlaneCoding coding, std::string_view bytes,
                                    uint64_t raw_size) {
  return draft_->append(PlaneKind::File, coding, bytes, raw_size);
}

void Encoder::add_file(uint32_t scope, std::string name, uint32_t plane) {
  draft_->files.push_back({{scope, plane, {}}, std::move(name)});
}

void Encoder::add_metadata(uint32_t scope, std::string key, std::string value) {
  draft_->metas.push_back({scope, std::move(key), std::move(value)});
}

uint64_t Encoder::finish() {
  Draft& d = *draft_;
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
  std::vector<uint32_t> number(d.planes.size(), kNone);
  for (bool external : {false, true}) {
    for (size_t i = 0; i < d.planes.size(); ++i) {
      Plane& p = d.planes[i];
      if (p.dropped || (p.record.coding == PlaneCoding::External) != external) continue;
      number[i] = static_cast<uint32_t>(index.planes.size());
      p.record.first_sum = index.sums.size();
      index.sums.insert(index.sums.end(), p.sums.begin(), p.sums.end());
      index.planes.push_back(p.record);
    }
  }
  auto numbered = [&](uint32_t plane) { return plane == kNone ? kNone : number[plane]; };
  for (const Plane& p : d.planes) {
    if (!p.dropped) continue;
    uint64_t size = align64(p.record.size);
    if (!index.free.empty() &&
        index.free.back().offset + index.free.back().size == p.record.offset) {
      index.free.back().size += size;
    } else {
      index.free.push_back({p.record.offset, size});
    }
  }

  index.header.writer = string(d.writer);
  index.header.base_storage = d.storage;
  index.header.merge = Merge::TaskArithmetic;
  index.header.scale = d.scale;
  for (const Tensor& t : d.tensors) {
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
  for (const auto& [name, threshold] : d.tasks) {
    TaskRecord r{};
    r.name = string(name);
    r.threshold = threshold;
    r.method = Method::Tall;
    index.tasks.push_back(r);
  }
  for (uint32_t k = 0; k < d.tasks.size(); ++k) {
    for (size_t i = 0; i < d.tensors.size(); ++i) {
      const Entry& e = d.tensors[i].entries[k];
      EntryRecord r = e.record;
      if (d.tensors[i].record.alias == kNone && r.coding != Coding::Absent) {
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
  std::sort(d.files.begin(), d.files.end(), [&](const auto& a, const auto& b) {
    return std::make_pair(scope_order(a.first.scope), std::string_view(a.second)) <
           std::make_pair(scope_order(b.first.scope), std::string_view(b.second));
  });
  std::sort(d.metas.begin(), d.metas.end(), [&](const auto& a, const auto& b) {
    return std::make_pair(scope_order(a.scope), std::string_view(a.key)) <
           std::make_pair(scope_order(b.scope), std::string_view(b.key));
  });
  for (auto& [record, name] : d.files) {
    index.files.push_back({record.scope, numbered(record.plane), string(name)});
  }
  for (const auto& meta : d.metas) {
    MetaRecord r{};
    r.scope = meta.scope;
    r.key = string(meta.key);
    r.value = string(meta.value);
    index.metas.push_back(r);
  }

  std::string bytes = write_index(index);
  uint64_t file_size = d.end + bytes.size();
  Header header = write_header(d.end, bytes, file_size);
  d.write(bytes.data(), bytes.size(), d.end);
  d.write(&header, sizeof header, 0);
  return file_size;
}

}  // namespace tallcodec
