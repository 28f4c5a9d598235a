// The public File: what an open file holds, and what is asked of it.
#include <algorithm>
#include <mutex>
#include <set>

#include "decode.h"
#include "format.h"
#include "kernels.h"
#include "parallel.h"
#include "text.h"

namespace tallcodec {
namespace {

struct Named {
  std::string_view name;
};

std::ostream& operator<<(std::ostream& out, const Named& n) { return out << "'" << n.name << "'"; }

std::string name(const Index& index, uint32_t tensor) {
  return text("tensor '", index.text(index.tensors[tensor].name), "'");
}

}  // namespace

File::File(std::string label, uint64_t file_size, Fetch fetch)
    : label_(std::move(label)), fetch_(std::move(fetch)) {
  uint64_t head = std::min<uint64_t>(file_size, sizeof(Header));
  Slot slot = read_header(label_, head ? fetch_(0, head) : nullptr, head, file_size);
  identity_ = slot.index_hash;
  size_ = slot.file_size;
  index_range_ = {slot.index_offset, slot.index_size};
  index_ = std::make_shared<Index>(
      read_index(label_, fetch_(slot.index_offset, slot.index_size), slot.index_size, slot));
}

std::vector<std::string> File::tasks() const {
  std::vector<std::string> names;
  for (const TaskRecord& t : index_->tasks) names.emplace_back(index_->text(t.name));
  return names;
}

std::vector<std::string> File::tensors() const {
  std::vector<std::string> names;
  for (const TensorRecord& t : index_->tensors) names.emplace_back(index_->text(t.name));
  return names;
}

uint32_t File::find_task(std::string_view name) const {
  std::string known;
  for (uint32_t i = 0; i < index_->tasks.size(); ++i) {
    std::string_view have = index_->text(index_->tasks[i].name);
    if (have == name) return i;
    known += text(i ? ", " : "", "'", have, "'");
  }
  throw Error(Status::TaskNotFound, text(label_, " has no task '", name, "'; it has ",
                                         known.empty() ? "none" : known));
}

uint32_t File::find_tensor(std::string_view name) const {
  const auto& all = index_->tensors;
  auto it = std::lower_bound(all.begin(), all.end(), name, [&](const TensorRecord& t, auto wanted) {
    return index_->text(t.name) < wanted;
  });
  if (it == all.end() || index_->text(it->name) != name) {
    throw Error(Status::TensorNotFound, text(label_, " has no tensor '", name, "'"));
  }
  return static_cast<uint32_t>(it - all.begin());
}

bool File::has(uint32_t task, uint32_t tensor) const {
  tensor = index_->original(tensor);
  if (task == kNone) return index_->tensors[tensor].in_base;
  return index_->entry(task, tensor).coding != Coding::Absent;
}

TensorInfo File::info(uint32_t task, uint32_t tensor) const {
  uint32_t target = index_->original(tensor);
  const TensorRecord& t = index_->tensors[target];
  DType dtype = t.dtype;
  uint32_t dims = t.dims;
  uint8_t rank = t.rank;
  if (!has(task, tensor)) {
    std::string owner = task == kNone
                            ? "the base"
                            : text("task '", index_->text(index_->tasks[task].name), "'");
    throw Error(Status::TensorNotFound,
                text(label_, ": ", owner, " has no ", name(*index_, tensor)));
  }
  if (task != kNone) {
    const EntryRecord& e = index_->entry(task, target);
    if (e.coding > Coding::Ternary) {
      throw Error(Status::Version, text(label_, ": ", name(*index_, tensor), " of task '",
                                        index_->text(index_->tasks[task].name), "' has coding ",
                                        int(e.coding), ", which needs a newer tallcodec"));
    }
    dtype = e.dtype;
    dims = e.dims;
    rank = e.rank;
  }
  const uint64_t* shape = index_->dims.data() + dims;
  return {dtype, {shape, shape + rank}, index_->elements(dims, rank) * size_of(dtype)};
}

std::vector<Range> File::ranges(uint32_t task, uint32_t tensor) const {
  std::vector<Range> ranges;
  for (uint32_t plane : planes_of(*index_, task, tensor)) {
    const PlaneRecord& p = index_->planes[plane];
    if (p.coding != PlaneCoding::External) ranges.push_back({p.offset, align64(p.size)});
  }
  return ranges;
}

bool File::needs_base(uint32_t task, uint32_t tensor) const {
  auto planes = planes_of(*index_, task, tensor);
  return std::any_of(planes.begin(), planes.end(), [&](uint32_t plane) {
    return index_->planes[plane].coding == PlaneCoding::External;
  });
}

void File::require_known(uint32_t task, uint32_t tensor) const {
  info(task, tensor);
  for (uint32_t plane : planes_of(*index_, task, tensor)) require_known_plane(*this, plane);
}

void File::decode(const std::vector<Request>& requests, const Options& options) const {
  Decoder decoder(*this, fetch_, options);
  std::vector<Job> jobs;
  for (const Request& request : requests) {
    info(request.task, request.tensor);  // refuses what is absent or of a newer writer
    jobs.push_back(decoder.job(request));
  }
  decoder.run(jobs);
}

Loaded File::load(uint32_t task, const std::vector<Request>& requests, const Options& options) const {
  Decoder decoder(*this, fetch_, options);
  std::vector<Job> jobs;
  std::set<uint32_t> seen;  // tied tensors have one plane
  for (Request request : requests) {
    request.task = task;
    request.first = 0;
    request.count = UINT64_MAX;
    info(task, request.tensor);  // refuses what is absent or of a newer writer
    if (seen.insert(index_->original(request.tensor)).second) jobs.push_back(decoder.job(request));
  }
  return decoder.load(jobs);
}

void File::merge(const std::vector<Request>& requests, const Merging& merging,
                 const Options& options) const {
  Decoder decoder(*this, fetch_, options);
  std::vector<Job> jobs;
  for (const Request& request : requests) {
    info(kNone, request.tensor);  // refuses what the base lacks
    jobs.push_back(decoder.merged_job(request, merging));
  }
  decoder.run(jobs);
}

std::vector<MaskCounts> File::count_masks(const std::vector<uint32_t>& tensors,
                                          const Options& options) const {
  Decoder decoder(*this, fetch_, options);
  struct Item {
    size_t tensor;
    uint64_t unit;
  };
  std::vector<Job> jobs;
  std::vector<MaskCounts> counts;
  std::vector<Item> items;
  for (uint32_t tensor : tensors) {
    MaskCounts c;
    c.tasks = decoder.masked_tasks(tensor);
    c.agreement.resize(c.tasks.size() + 1);
    c.overlap.resize(c.tasks.size() * c.tasks.size());
    jobs.push_back(decoder.counting_job(tensor, c.tasks));
    for (uint64_t u = 0; u < jobs.back().units(); ++u) items.push_back({counts.size(), u});
    counts.push_back(std::move(c));
  }
  std::mutex mutex;
  parallel_for(items.size(), options.threads, watch(options, "counting masks"), [&](uint64_t i, unsigned worker) {
    MaskCounts& total = counts[items[i].tensor];
    MaskCounts unit;
    unit.agreement.resize(total.agreement.size());
    unit.overlap.resize(total.overlap.size());
    decoder.count_unit(jobs[items[i].tensor], items[i].unit, worker, unit);
    std::lock_guard lock(mutex);
    total.zeros += unit.zeros;
    for (size_t k = 0; k < unit.agreement.size(); ++k) total.agreement[k] += unit.agreement[k];
    for (size_t p = 0; p < unit.overlap.size(); ++p) total.overlap[p] += unit.overlap[p];
  });
  for (MaskCounts& c : counts) {  // the kernel counts each pair once
    const size_t tasks = c.tasks.size();
    for (size_t x = 0; x < tasks; ++x) {
      for (size_t y = 0; y < x; ++y) c.overlap[x * tasks + y] = c.overlap[y * tasks + x];
    }
  }
  return counts;
}

std::vector<uint8_t> File::read_plane(uint32_t plane, const Options& options) const {
  return Decoder(*this, fetch_, options).whole_plane(plane);
}

std::vector<Damage> File::verify(const Options& options) const {
  Decoder decoder(*this, fetch_, options);
  struct Item {
    PlaneBytes plane;
    uint64_t block;
  };
  std::vector<Item> items;
  for (uint32_t id = 0; id < index_->planes.size(); ++id) {
    if (index_->planes[id].coding == PlaneCoding::External) continue;
    PlaneBytes plane = decoder.stored_plane(id);
    for (uint64_t b = 0; b * kSumBlock < plane.size(); ++b) items.push_back({plane, b});
  }
  std::vector<Damage> damage;
  std::mutex mutex;
  parallel_for(items.size(), options.threads, watch(options, "verifying"), [&](uint64_t i, unsigned) {
    const auto& [plane, block] = items[i];
    if (decoder.intact(plane, block, plane.source.memory + block * kSumBlock)) return;
    std::lock_guard lock(mutex);
    damage.push_back({plane.id, block});
  });
  for (uint32_t task = 0; damage.empty() && task < index_->tasks.size(); ++task) {
    for (uint32_t i = 0; i < index_->tensors.size(); ++i) {
      if (!decoder.is_coded(task, i)) continue;
      if (options.poll) options.poll("verifying coded planes", task, index_->tasks.size());
      decoder.try_plane(task, i);
    }
  }
  std::sort(damage.begin(), damage.end(), [](const Damage& a, const Damage& b) {
    return a.plane != b.plane ? a.plane < b.plane : a.block < b.block;
  });
  return damage;
}

std::string File::describe(uint32_t plane) const { return describe(std::vector<uint32_t>{plane})[0]; }

std::vector<std::string> File::describe(const std::vector<uint32_t>& planes) const {
  std::map<uint32_t, std::string> found;  // in one pass over the index, however many there are
  for (uint32_t plane : planes) found[plane];
  const auto belongs = [&](uint32_t plane, const auto&... parts) {
    const auto it = found.find(plane);
    if (plane != kNone && it != found.end() && it->second.empty()) it->second = text(parts...);
  };
  for (uint32_t i = 0; i < index_->tensors.size(); ++i) {
    const TensorRecord& t = index_->tensors[i];
    if (t.alias != kNone) continue;
    const Named tensor{index_->text(t.name)};
    belongs(t.base_plane, "base plane of tensor ", tensor);
    belongs(t.shared_plane, "shared plane of tensor ", tensor);
    belongs(t.shared_scales_plane, "shared vector's scales of tensor ", tensor);
    for (uint32_t k = 0; k < index_->tasks.size(); ++k) {
      const EntryRecord& e = index_->entry(k, i);
      if (e.coding == Coding::Absent) continue;
      const Named task{index_->text(index_->tasks[k].name)};
      const char* const kind = e.coding == Coding::Mask      ? "mask"
                               : e.coding == Coding::Ternary ? "ternary plane"
                                                             : "verbatim plane";
      belongs(e.plane, kind, " of tensor ", tensor, ", task ", task);
      belongs(e.scales_plane, "scales per row of tensor ", tensor, ", task ", task);
    }
  }
  for (const FileRecord& f : index_->files) belongs(f.plane, "file ", Named{index_->text(f.name)});
  std::vector<std::string> out;
  for (uint32_t plane : planes) out.push_back(found[plane].empty() ? text("plane ", plane) : found[plane]);
  return out;
}

}  // namespace tallcodec
