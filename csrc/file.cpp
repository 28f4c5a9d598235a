// An open file: planes and kernels to tensors.
#include <algorithm>
#include <cstring>
#include <mutex>

#include "format.h"
#include "kernels.h"
#include "parallel.h"
#include "ternary.h"
#include "text.h"

namespace tallcodec {
namespace {

std::string name(const Index& index, uint32_t tensor) {
  return text("tensor '", index.text(index.tensors[tensor].name), "'");
}

// The planes that decoding a tensor reads.
std::vector<uint32_t> planes_of(const Index& index, uint32_t task, uint32_t tensor) {
  tensor = index.original(tensor);
  const TensorRecord& t = index.tensors[tensor];
  const EntryRecord* e = task == kNone ? nullptr : &index.entry(task, tensor);
  std::vector<uint32_t> planes;
  auto use = [&](uint32_t plane) {
    if (plane != kNone) planes.push_back(plane);
  };
  const bool ternary = e && e->coding == Coding::Ternary;
  if (!e || e->coding == Coding::Base || e->coding == Coding::Mask || ternary) use(t.base_plane);
  if (e && e->coding == Coding::Mask) {
    use(t.shared_plane);
    use(t.shared_scales_plane);
  }
  if (e && (e->coding == Coding::Mask || e->coding == Coding::Verbatim || ternary)) {
    use(e->plane);
    use(e->scales_plane);
  }
  return planes;
}

// A plane's bytes and checksums. Those of an external one are the caller's, and end without padding.
struct PlaneBytes {
  const PlaneRecord* record = nullptr;
  uint32_t id = kNone;
  Source source;

  uint64_t size() const {
    return record->coding == PlaneCoding::External ? record->raw_size : align64(record->size);
  }
};

// One tensor on its way out.
struct Job {
  const Request* request = nullptr;
  Coding coding;       // as the base, mask, verbatim or ternary
  PlaneBytes copied;   // as the base, verbatim: what the tensor is
  PlaneBytes base, shared, shared_scales, row_scales;
  std::vector<PlaneBytes> masks;
  PlaneBytes coded;  // ternary
  std::shared_ptr<const TernaryPlane> ternary;
  uint32_t min_tasks = 1;  // as in Merging; a task's own mask is the consensus of one
  DecodeBlock block{};     // the types and the scale
  uint64_t elements = 0, row_length = 0;

  uint64_t parts() const {
    if (coding == Coding::Mask) return units();
    if (coding == Coding::Ternary) return ternary->blocks();
    if (!copied.record) return 0;  // no elements
    if (copied.record->coding == PlaneCoding::Zstd) return 1;
    return (copied.record->raw_size + kCopyChunk - 1) / kCopyChunk;
  }
  uint64_t units() const { return (elements + kUnit - 1) / kUnit; }
};

// What a thread reads into or computes.
struct Buffers {
  std::vector<uint8_t> base, mask, signs;
};

class Decoder {
 public:
  Decoder(const File& file, const File::Fetch& fetch, const Options& options)
      : file_(file),
        index_(file.index()),
        fetch_(fetch),
        options_(options),
        kernels_(options.kernels ? *options.kernels : require_kernels()),
        buffers_(std::max(1u, options.threads)) {}

  // A plane as it is stored, of whatever kind and coding.
  PlaneBytes stored_plane(uint32_t id) const {
    const PlaneRecord& p = index_.planes[id];
    if (p.coding == PlaneCoding::External) return {&p, id, {}};
    return {&p, id, Source{fetch_(p.offset, align64(p.size))}};
  }

  // A plane that can be decoded.
  PlaneBytes known_plane(uint32_t id) const {
    const PlaneRecord& p = index_.planes[id];
    if (!is_known(p.kind) || p.coding > PlaneCoding::Gaps) {
      throw Error(Status::Version,
                  text(file_.label(), ": the ", file_.describe(id), " has kind ", int(p.kind),
                       " and coding ", int(p.coding), ", which need a newer tallcodec"));
    }
    return stored_plane(id);
  }

  Job job(const Request& request) const {
    Job j{};
    j.request = &request;
    const uint32_t tensor = index_.original(request.tensor);
    const TensorRecord& t = index_.tensors[tensor];
    j.elements = index_.elements(t.dims, t.rank);
    const EntryRecord* e = request.task == kNone ? nullptr : &index_.entry(request.task, tensor);
    j.coding = e ? e->coding : Coding::Base;
    switch (j.coding) {
      case Coding::Base:
        if (t.base_plane != kNone) j.copied = base_plane(request, t.base_plane);
        break;
      case Coding::Verbatim:
        if (e->plane != kNone) j.copied = known_plane(e->plane);
        break;
      case Coding::Ternary:
        j.base = base_plane(request, t.base_plane);
        use_ternary(j, *e);
        j.block.base_dtype = t.dtype;
        j.block.out_dtype = e->dtype;
        j.block.shared_dtype = kSigns;
        j.block.scale = e->scale;
        break;
      default:
        j.base = base_plane(request, t.base_plane);
        use_shared(j, t);
        j.masks = {known_plane(e->plane)};
        if (e->scales_plane != kNone) {
          j.row_scales = known_plane(e->scales_plane);
          j.row_length = j.elements / index_.rows(t);
        }
        j.block.out_dtype = e->dtype;
        j.block.scale = e->scale;
    }
    return j;
  }

  // A tensor of a merged model: the base's where no task has a mask.
  Job merged_job(const Request& request, const Merging& merging) const {
    const TensorRecord& t = index_.tensors[index_.original(request.tensor)];
    const std::vector<uint32_t> tasks = masked_tasks(request.tensor);
    Job j = job(request);
    if (tasks.empty()) return j;
    j.coding = Coding::Mask;
    j.base = j.copied;
    use_shared(j, t);
    if (merging.min_tasks > 0) use_masks(j, request.tensor, tasks);
    j.min_tasks = merging.min_tasks;
    j.block.out_dtype = t.dtype;
    j.block.scale = merging.scale;
    return j;
  }

  // The masks of a tensor, to be counted.
  Job counting_job(uint32_t tensor, const std::vector<uint32_t>& tasks) const {
    const TensorRecord& t = index_.tensors[index_.original(tensor)];
    Job j{};
    if (tasks.empty()) return j;
    j.elements = index_.elements(t.dims, t.rank);
    use_shared(j, t);
    use_masks(j, tensor, tasks);
    return j;
  }

  // The tasks that have a mask for a tensor, all codings known.
  std::vector<uint32_t> masked_tasks(uint32_t tensor) const {
    std::vector<uint32_t> tasks;
    for (uint32_t k = 0; k < index_.tasks.size(); ++k) {
      if (!file_.has(k, tensor)) continue;
      file_.info(k, tensor);  // refuses what is of a newer writer
      if (index_.entry(k, index_.original(tensor)).coding == Coding::Mask) tasks.push_back(k);
    }
    return tasks;
  }

  void run(const std::vector<Job>& jobs) {
    struct Item {
      const Job* job;
      uint64_t part;
    };
    std::vector<Item> items;
    for (const Job& job : jobs) {
      for (uint64_t part = 0; part < job.parts(); ++part) items.push_back({&job, part});
    }
    parallel_for(items.size(), options_.threads, options_.poll, [&](uint64_t i, unsigned worker) {
      const auto& [job, part] = items[i];
      if (job->coding == Coding::Mask) {
        decode_unit(*job, part, buffers_[worker]);
      } else if (job->coding == Coding::Ternary) {
        decode_ternary(*job, part, buffers_[worker]);
      } else {
        copy(job->copied, part, static_cast<uint8_t*>(job->request->out), buffers_[worker].base);
      }
    });
  }

  // Adds what the masks of one unit say; counts.agreement and counts.overlap have their sizes.
  void count_unit(const Job& job, uint64_t unit, MaskCounts& counts) const {
    const uint64_t first = unit * kUnit, end = std::min(first + kUnit, job.elements);
    const std::vector<const uint8_t*> masks = unit_masks(job, first, end);
    const MaskBlock block{end - first, static_cast<uint32_t>(masks.size()), masks.data()};
    const uint32_t size = size_of(job.block.shared_dtype);
    const uint8_t* shared = part(job.shared, first * size, end * size);
    const float* scales = shared_scales(job, first, end);
    const uint64_t zeros = kernels_.zeros(shared, job.block.shared_dtype, scales, end - first);
    counts.zeros += zeros;
    kernels_.agreement(block, counts.agreement.data());
    if (counts.agreement[0] < zeros) {
      throw Error(Status::Format, text(file_.label(), ": masks of ", file_.describe(job.shared.id),
                                       " have bits where it is 0"));
    }
    counts.agreement[0] -= zeros;
    kernels_.overlap(block, counts.overlap.data());
  }

  // Part `part` of a plane on which nothing is computed.
  void copy(const PlaneBytes& plane, uint64_t part, uint8_t* out,
            std::vector<uint8_t>& buffer) const {
    const PlaneRecord& p = *plane.record;
    if (p.coding == PlaneCoding::Zstd) {
      check(plane, plane.source.memory, 0, p.size);
      if (!options_.inflate) {
        throw Error(Status::Argument, text(file_.label(), ": ", file_.describe(plane.id),
                                           " is a zstd frame, and no decompressor was given"));
      }
      try {
        options_.inflate(plane.source.memory, p.size, out, p.raw_size);
      } catch (const Error& e) {
        throw Error(e.status, text(file_.label(), ": the ", file_.describe(plane.id), ": ", e.message));
      }
      return;
    }
    uint64_t begin = part * kCopyChunk, end = std::min(begin + kCopyChunk, p.raw_size);
    for (uint64_t at = begin; at < end; at += kSumBlock) {
      uint64_t size = std::min(kSumBlock, end - at);
      const uint8_t* bytes = view(plane, at, size, buffer);
      check(plane, bytes, at, size);
      std::memcpy(out + at, bytes, size);
    }
  }

  // Decodes a task's ternary plane to nowhere; throws where it is not sound.
  void try_ternary(uint32_t tensor, const EntryRecord& e) const {
    Job j{};
    j.elements = index_.elements(index_.tensors[tensor].dims, index_.tensors[tensor].rank);
    use_ternary(j, e);
    std::vector<uint8_t> mask(kTernaryBlock / 8), signs(kTernaryBlock / 8);
    uint64_t kept = 0;
    for (uint64_t block = 0; block < j.ternary->blocks(); ++block) {
      const uint64_t n = std::min(kTernaryBlock, j.elements - block * kTernaryBlock);
      unpack(j, block, mask.data(), signs.data());
      for (uint64_t i = 0; i < (n + 7) / 8; ++i) kept += uint64_t(__builtin_popcount(mask[i]));
    }
    if (kept != e.set_bits) {
      unsound(j, Error(Status::Format, text(kept, " elements are not 0, its entry says ", e.set_bits)));
    }
  }

  // The checksum of block `block` of a plane whose bytes from that block's beginning are given.
  bool intact(const PlaneBytes& plane, uint64_t block, const uint8_t* bytes) const {
    uint64_t size = std::min(kSumBlock, plane.size() - block * kSumBlock);
    return hash_block(kernels_, bytes, size) == index_.sums[plane.record->first_sum + block];
  }

 private:
  void use_shared(Job& j, const TensorRecord& t) const {
    j.shared = known_plane(t.shared_plane);
    if (t.shared_scales_plane != kNone) j.shared_scales = known_plane(t.shared_scales_plane);
    j.row_length = j.elements;
    j.block.base_dtype = t.dtype;
    j.block.shared_dtype = t.shared_dtype;
  }

  void use_masks(Job& j, uint32_t tensor, const std::vector<uint32_t>& tasks) const {
    for (uint32_t task : tasks) {
      j.masks.push_back(known_plane(index_.entry(task, index_.original(tensor)).plane));
    }
  }

  void use_ternary(Job& j, const EntryRecord& e) const {
    j.coded = known_plane(e.plane);
    const uint8_t* const bytes = j.coded.source.memory;
    try {
      j.ternary = std::make_shared<TernaryPlane>(bytes, j.coded.record->size, j.elements);
    } catch (const Error& e) {
      check(j.coded, bytes, 0, j.coded.record->size);  // damage is to be called so
      unsound(j, e);
    }
    check(j.coded, bytes, 0, j.ternary->head());
  }

  // The bits of a block of a ternary plane.
  void unpack(const Job& job, uint64_t block, uint8_t* mask, uint8_t* signs) const {
    try {
      job.ternary->decode(block, mask, signs);
    } catch (const Error& e) {
      unsound(job, e);
    }
  }

  [[noreturn]] void unsound(const Job& job, const Error& e) const {
    throw Error(e.status, text(file_.label(), ": ", file_.describe(job.coded.id), ": ", e.message));
  }

  PlaneBytes base_plane(const Request& request, uint32_t id) const {
    PlaneBytes plane = known_plane(id);
    if (plane.record->coding == PlaneCoding::External) {
      if (!request.base) {
        throw Error(Status::BaseMismatch,
                    text(file_.label(), " only references its base, and none was given: pass the ",
                         "base checkpoint it was encoded against (base=, --base)"));
      }
      plane.source = request.base;
    }
    return plane;
  }

  const uint8_t* view(const PlaneBytes& plane, uint64_t at, uint64_t size,
                      std::vector<uint8_t>& buffer) const {
    try {
      return plane.source.view(at, size, buffer);
    } catch (const Error& e) {
      throw Error(e.status, text("base, ", file_.describe(plane.id), ": ", e.message),
                  e.system_error);
    }
  }

  // Checks the checksum blocks that [at, at + size) touches. `bytes` is where `at` lies; `at` begins a
  // block where the plane is external.
  void check(const PlaneBytes& plane, const uint8_t* bytes, uint64_t at, uint64_t size) const {
    if (!options_.verify) return;
    uint64_t end = at + size;
    for (uint64_t block = at / kSumBlock; block * kSumBlock < end; ++block) {
      if (intact(plane, block, bytes + static_cast<int64_t>(block * kSumBlock - at))) continue;
      if (plane.record->coding == PlaneCoding::External) {
        throw Error(Status::BaseMismatch,
                    text(file_.label(), ": the base that was given is not the one the file was ",
                         "encoded against: it differs in ", file_.describe(plane.id)));
      }
      throw Error(Status::Checksum, text(file_.label(), ": damaged: wrong checksum in the ",
                                         file_.describe(plane.id), ", block ", block));
    }
  }

  // Bytes [begin, stop) of a plane that the file holds, checked.
  const uint8_t* part(const PlaneBytes& plane, uint64_t begin, uint64_t stop) const {
    const uint8_t* bytes = plane.source.memory + begin;
    check(plane, bytes, begin, stop - begin);
    return bytes;
  }

  // The int8 scales of elements [first, end), if there are any; `first` begins a unit.
  const float* shared_scales(const Job& job, uint64_t first, uint64_t end) const {
    if (!job.shared_scales.record) return nullptr;
    return reinterpret_cast<const float*>(
        part(job.shared_scales, first / kScaleBlock * 4, (end + kScaleBlock - 1) / kScaleBlock * 4));
  }

  std::vector<const uint8_t*> unit_masks(const Job& job, uint64_t first, uint64_t end) const {
    std::vector<const uint8_t*> masks;
    for (const PlaneBytes& mask : job.masks) masks.push_back(part(mask, first / 8, (end + 7) / 8));
    return masks;
  }

  // The mask to decode elements [first, end) with.
  const uint8_t* unit_mask(const Job& job, uint64_t first, uint64_t end,
                           std::vector<uint8_t>& buffer) const {
    const std::vector<const uint8_t*> masks = unit_masks(job, first, end);
    if (masks.size() == 1 && job.min_tasks == 1) return masks[0];
    buffer.assign((end - first + 7) / 8, 0xff);
    if (job.min_tasks > 0) {
      const MaskBlock block{end - first, static_cast<uint32_t>(masks.size()), masks.data()};
      kernels_.consensus(block, job.min_tasks, buffer.data());
    }
    return buffer.data();
  }

  void decode_ternary(const Job& job, uint64_t number, Buffers& buffers) const {
    const uint64_t first = number * kTernaryBlock;
    const uint64_t n = std::min(kTernaryBlock, job.elements - first);
    const uint64_t begin = job.ternary->begin(number), end = job.ternary->end(number);
    part(job.coded, begin, end);
    buffers.mask.resize((n + 7) / 8);
    buffers.signs.resize((n + 7) / 8);
    unpack(job, number, buffers.mask.data(), buffers.signs.data());
    const uint32_t base_size = size_of(job.block.base_dtype), out_size = size_of(job.block.out_dtype);
    const uint64_t step = kSumBlock / base_size;
    for (uint64_t at = 0; at < n; at += step) {
      const uint64_t size = std::min(step, n - at), position = (first + at) * base_size;
      DecodeBlock block = job.block;
      block.n = size;
      const uint8_t* const base = view(job.base, position, size * base_size, buffers.base);
      check(job.base, base, position, size * base_size);
      block.base = base;
      block.mask = buffers.mask.data() + at / 8;
      block.shared = buffers.signs.data() + at / 8;
      block.out = static_cast<uint8_t*>(job.request->out) + (first + at) * out_size;
      kernels_.decode(block);
    }
  }

  void decode_unit(const Job& job, uint64_t unit, Buffers& buffers) const {
    const uint64_t first = unit * kUnit, end = std::min(first + kUnit, job.elements);
    const uint32_t base_size = size_of(job.block.base_dtype);
    const uint32_t shared_size = size_of(job.block.shared_dtype);
    // Whole checksum blocks of base and shared, small enough to stay in cache from check to kernel.
    const uint64_t step = kSumBlock / std::min(base_size, shared_size);
    const uint8_t* mask = unit_mask(job, first, end, buffers.mask);
    const float* int8_scales = shared_scales(job, first, end);
    const float* row_scales = nullptr;
    const uint64_t first_row = first / job.row_length;
    if (job.row_scales.record) {
      uint64_t rows_end = (end - 1) / job.row_length + 1;
      row_scales =
          reinterpret_cast<const float*>(part(job.row_scales, first_row * 4, rows_end * 4));
    }

    for (uint64_t at = first; at < end; at += step) {
      uint64_t stop = std::min(at + step, end);
      const uint8_t* base = view(job.base, at * base_size, (stop - at) * base_size, buffers.base);
      check(job.base, base, at * base_size, (stop - at) * base_size);
      const uint8_t* shared = part(job.shared, at * shared_size, stop * shared_size);

      for (uint64_t i = at; i < stop;) {
        uint64_t row = i / job.row_length, row_end = std::min((row + 1) * job.row_length, stop);
        DecodeBlock block = job.block;
        block.n = row_end - i;
        block.phase = i % kScaleBlock;
        block.base = base + (i - at) * base_size;
        block.shared = shared + (i - at) * shared_size;
        block.mask = mask + (i - block.phase - first) / 8;
        if (int8_scales) block.shared_scales = int8_scales + (i - block.phase - first) / kScaleBlock;
        if (row_scales) block.scale = row_scales[row - first_row];
        block.out = static_cast<uint8_t*>(job.request->out) + i * size_of(block.out_dtype);
        kernels_.decode(block);
        i = row_end;
      }
    }
  }

  const File& file_;
  const Index& index_;
  const File::Fetch& fetch_;
  const Options& options_;
  const Kernels& kernels_;
  std::vector<Buffers> buffers_;  // one per worker
};

}  // namespace

File::File(std::string label, uint64_t file_size, Fetch fetch)
    : label_(std::move(label)), fetch_(std::move(fetch)) {
  uint64_t head = std::min<uint64_t>(file_size, sizeof(Header));
  Slot slot = read_header(label_, head ? fetch_(0, head) : nullptr, head, file_size);
  identity_ = slot.index_hash;
  size_ = slot.file_size;
  index_ = std::make_shared<Index>(
      read_index(label_, fetch_(slot.index_offset, slot.index_size), slot.index_size, slot));
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

void File::decode(const std::vector<Request>& requests, const Options& options) const {
  Decoder decoder(*this, fetch_, options);
  std::vector<Job> jobs;
  for (const Request& request : requests) {
    info(request.task, request.tensor);  // refuses what is absent or of a newer writer
    jobs.push_back(decoder.job(request));
  }
  decoder.run(jobs);
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
  parallel_for(items.size(), options.threads, options.poll, [&](uint64_t i, unsigned) {
    MaskCounts& total = counts[items[i].tensor];
    MaskCounts unit;
    unit.agreement.resize(total.agreement.size());
    unit.overlap.resize(total.overlap.size());
    decoder.count_unit(jobs[items[i].tensor], items[i].unit, unit);
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
  Decoder decoder(*this, fetch_, options);
  Job job{};
  job.copied = decoder.known_plane(plane);
  std::vector<uint8_t> out(job.copied.record->raw_size), unused;
  for (uint64_t part = 0; part < job.parts(); ++part) {
    decoder.copy(job.copied, part, out.data(), unused);
  }
  return out;
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
  parallel_for(items.size(), options.threads, options.poll, [&](uint64_t i, unsigned) {
    const auto& [plane, block] = items[i];
    if (decoder.intact(plane, block, plane.source.memory + block * kSumBlock)) return;
    std::lock_guard lock(mutex);
    damage.push_back({plane.id, block});
  });
  const auto is_damaged = [&](uint32_t plane) {
    return std::any_of(damage.begin(), damage.end(), [&](const Damage& d) { return d.plane == plane; });
  };
  for (uint32_t task = 0; task < index_->tasks.size(); ++task) {
    for (uint32_t i = 0; i < index_->tensors.size(); ++i) {
      if (index_->tensors[i].alias != kNone) continue;
      const EntryRecord& e = index_->entry(task, i);
      if (e.coding != Coding::Ternary || is_damaged(e.plane)) continue;
      if (!is_known(index_->planes[e.plane].kind)) continue;
      if (options.poll) options.poll();
      decoder.try_ternary(i, e);
    }
  }
  std::sort(damage.begin(), damage.end(), [](const Damage& a, const Damage& b) {
    return a.plane != b.plane ? a.plane < b.plane : a.block < b.block;
  });
  return damage;
}

std::string File::describe(uint32_t plane) const {
  for (uint32_t i = 0; i < index_->tensors.size(); ++i) {
    const TensorRecord& t = index_->tensors[i];
    if (t.base_plane == plane) return text("base plane of ", name(*index_, i));
    if (t.shared_plane == plane) return text("shared plane of ", name(*index_, i));
    if (t.shared_scales_plane == plane) return text("shared vector's scales of ", name(*index_, i));
    if (t.alias != kNone) continue;
    for (uint32_t k = 0; k < index_->tasks.size(); ++k) {
      const EntryRecord& e = index_->entry(k, i);
      if (e.coding == Coding::Absent) continue;
      const char* kind = e.plane == plane ? (e.coding == Coding::Mask      ? "mask"
                                             : e.coding == Coding::Ternary ? "ternary plane"
                                                                           : "verbatim plane")
                         : e.scales_plane == plane ? "scales per row"
                                                   : nullptr;
      if (kind && plane != kNone) {
        return text(kind, " of ", name(*index_, i), ", task '",
                    index_->text(index_->tasks[k].name), "'");
      }
    }
  }
  for (const FileRecord& f : index_->files) {
    if (f.plane == plane) return text("file '", index_->text(f.name), "'");
  }
  return text("plane ", plane);
}

}  // namespace tallcodec
