#include "decode.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"
#include "text.h"

namespace tallcodec {

std::vector<uint32_t> planes_of(const Index& index, uint32_t task, uint32_t tensor) {
  tensor = index.original(tensor);
  const TensorRecord& t = index.tensors[tensor];
  std::vector<uint32_t> planes;
  auto use = [&](uint32_t plane) {
    if (plane != kNone) planes.push_back(plane);
  };
  if (task == kNone) {
    use(t.base_plane);
    return planes;
  }
  const EntryRecord& e = index.entry(task, tensor);
  switch (e.coding) {
    case Coding::Base:
      use(t.base_plane);
      break;
    case Coding::Verbatim:
      use(e.plane);
      break;
    case Coding::Mask:
      use(t.base_plane);
      use(t.shared_plane);
      use(t.shared_scales_plane);
      use(e.plane);
      use(e.scales_plane);
      break;
    case Coding::Ternary:
      use(t.base_plane);
      use(e.plane);
      break;
    default:
      break;
  }
  return planes;
}

void require_known_plane(const File& file, uint32_t id) {
  const PlaneRecord& p = file.index().planes[id];
  if (is_known(p)) return;
  throw Error(Status::Version, text(file.label(), ": the ", file.describe(id), " has kind ", int(p.kind), " and coding ",
                                    int(p.coding), ", which need a newer tallcodec"));
}

Decoder::Decoder(const File& file, const File::Fetch& fetch, const Options& options)
    : file_(file),
      index_(file.index()),
      fetch_(fetch),
      options_(options),
      kernels_(options.kernels ? *options.kernels : require_kernels()),
      buffers_(std::max(1u, options.threads)) {}

PlaneBytes Decoder::stored_plane(uint32_t id) const {
  const PlaneRecord& p = index_.planes[id];
  if (p.coding == PlaneCoding::External) return {&p, id, {}};
  return {&p, id, Source{fetch_(p.offset, align64(p.size))}};
}

// A plane that can be decoded.
PlaneBytes Decoder::known_plane(uint32_t id) const {
  const PlaneRecord& p = index_.planes[id];
  require_known_plane(file_, id);
  if (options_.loaded) {
    const auto found = options_.loaded->planes.find(id);
    if (found != options_.loaded->planes.end() && found->second.size() == p.raw_size) {
      return {&p, id, Source{found->second.data()}, true};
    }
  }
  return stored_plane(id);
}

MaskPlane Decoder::mask_plane(uint32_t id) const {
  MaskPlane mask{known_plane(id), {}};
  const PlaneRecord& p = *mask.plane.record;
  if (mask.plane.coding() != PlaneCoding::Conditional) return mask;
  read_head(mask.plane, [&] {
    const uint64_t blocks = (p.raw_size * 8 + kMaskBlock - 1) / kMaskBlock, head = 8 * blocks;
    require(p.size >= head, "it is too short");
    mask.coded.emplace(mask.plane.source.memory, p.size, blocks, head);
    return head;
  });
  return mask;
}

// Reads the head of a coded plane by `read`, which gives its size, and checks it.
template <class Read>
void Decoder::read_head(const PlaneBytes& plane, Read read) const {
  const uint8_t* const bytes = plane.source.memory;
  uint64_t size = 0;
  try {
    size = read();
  } catch (const Error& e) {
    check(plane, bytes, 0, plane.record->size);  // damage is to be called so
    unsound(plane, e);
  }
  check(plane, bytes, 0, size);
}

PlaneBytes Decoder::base_plane(const Request& request, uint32_t id) const {
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

Job Decoder::job(const Request& request) const {
  Job j{};
  j.request = &request;
  const uint32_t tensor = index_.original(request.tensor);
  const TensorRecord& t = index_.tensors[tensor];
  const EntryRecord* e = request.task == kNone ? nullptr : &index_.entry(request.task, tensor);
  j.elements = e ? index_.elements(e->dims, e->rank) : index_.elements(t.dims, t.rank);
  j.first = std::min(request.first, j.elements);
  j.end = j.first + std::min(request.count, j.elements - j.first);
  j.element_size = size_of(e ? e->dtype : t.dtype);
  if (!j.elements) return j;
  j.coding = e ? e->coding : Coding::Base;
  if (j.coding == Coding::Base) {
    j.copied = base_plane(request, t.base_plane);
    return j;
  }
  if (j.coding == Coding::Verbatim) {
    j.copied = known_plane(e->plane);
    return j;
  }
  j.base = base_plane(request, t.base_plane);
  j.row_length = j.elements;
  j.block.base_dtype = t.dtype;
  j.block.out_dtype = e->dtype;
  j.block.scale = e->scale;
  if (j.coding == Coding::Ternary) {
    use_ternary(j, *e);
  } else {
    use_shared(j, t);
    j.masks = {mask_plane(e->plane)};
    if (e->scales_plane != kNone) {
      j.row_scales = known_plane(e->scales_plane);
      j.row_length = j.elements / index_.rows(t);
    }
  }
  return j;
}

Job Decoder::merged_job(const Request& request, const Merging& merging) const {
  const TensorRecord& t = index_.tensors[index_.original(request.tensor)];
  const std::vector<uint32_t> tasks = masked_tasks(request.tensor);
  Job j = job(request);
  if (tasks.empty()) return j;
  j.coding = Coding::Mask;
  j.base = j.copied;
  use_shared(j, t);
  if (merging.min_tasks > 0) use_masks(j, request.tensor, tasks);
  j.min_tasks = merging.min_tasks;
  j.row_length = j.elements;
  j.block.base_dtype = j.block.out_dtype = t.dtype;
  j.block.scale = merging.scale;
  return j;
}

Job Decoder::counting_job(uint32_t tensor, const std::vector<uint32_t>& tasks) const {
  const TensorRecord& t = index_.tensors[index_.original(tensor)];
  Job j{};
  if (tasks.empty()) return j;
  j.elements = index_.elements(t.dims, t.rank);
  use_shared(j, t);
  use_masks(j, tensor, tasks);
  return j;
}

std::vector<uint32_t> Decoder::masked_tasks(uint32_t tensor) const {
  std::vector<uint32_t> tasks;
  for (uint32_t k = 0; k < index_.tasks.size(); ++k) {
    if (!file_.has(k, tensor)) continue;
    file_.info(k, tensor);  // refuses what is of a newer writer
    if (index_.entry(k, index_.original(tensor)).coding == Coding::Mask) tasks.push_back(k);
  }
  return tasks;
}

void Decoder::use_shared(Job& j, const TensorRecord& t) const {
  j.shared = known_plane(t.shared_plane);
  if (t.shared_scales_plane != kNone) j.shared_scales = known_plane(t.shared_scales_plane);
  j.block.shared_dtype = t.shared_dtype;
}

void Decoder::use_masks(Job& j, uint32_t tensor, const std::vector<uint32_t>& tasks) const {
  for (uint32_t task : tasks) {
    j.masks.push_back(mask_plane(index_.entry(task, index_.original(tensor)).plane));
  }
}

void Decoder::use_ternary(Job& j, const EntryRecord& e) const {
  j.block.shared_dtype = kSigns;
  j.coded = known_plane(e.plane);
  if (j.coded.coding() == PlaneCoding::Raw) return;
  read_head(j.coded, [&] {
    j.ternary = std::make_shared<TernaryPlane>(j.coded.source.memory, j.coded.record->size, j.elements);
    return j.ternary->blocks().head();
  });
}

void Decoder::unsound(const PlaneBytes& plane, const Error& e) const {
  throw Error(e.status, text(file_.label(), ": ", file_.describe(plane.id), ": ", e.message));
}

// Runs body(job, part, buffers) for all parts that are wanted of all jobs.
template <class Body>
void Decoder::for_each_part(const std::vector<Job>& jobs, Body body) {
  struct Item {
    const Job* job;
    uint64_t part;
  };
  std::vector<Item> items;
  for (const Job& job : jobs) {
    for (uint64_t part = job.first_part(); part < job.end_part(); ++part) items.push_back({&job, part});
  }
  parallel_for(items.size(), options_.threads, watch(options_, "decoding"), [&](uint64_t i, unsigned worker) {
    body(*items[i].job, items[i].part, buffers_[worker]);
  });
}

void Decoder::run(const std::vector<Job>& jobs) {
  for_each_part(jobs, [&](const Job& job, uint64_t part, Buffers& buffers) {
    if (job.computed()) {
      decode_unit(job, part, buffers);
    } else {
      copy_part(job, part, buffers);
    }
  });
}

Loaded Decoder::load(const std::vector<Job>& jobs) {
  Loaded to;
  std::vector<Job> needed;
  const auto add = [&](const PlaneBytes& plane) {
    return !plane.record || to.planes.try_emplace(plane.id, plane.record->raw_size).second;
  };
  for (const Job& job : jobs) {
    // Several entries may name one verbatim plane.
    if (job.coding == Coding::Verbatim && !add(job.copied)) continue;
    for (const MaskPlane& mask : job.masks) add(mask.plane);
    add(job.row_scales);
    add(job.coded);
    needed.push_back(job);
  }
  for_each_part(needed, [&](const Job& job, uint64_t part, Buffers& buffers) {
    load_part(job, part, buffers, to);
  });
  return to;
}

void Decoder::count_unit(const Job& job, uint64_t unit, unsigned worker, MaskCounts& counts) {
  const uint64_t first = unit * kUnit, end = std::min(first + kUnit, job.elements);
  const std::vector<const uint8_t*> masks = unit_masks(job, first, end, buffers_[worker]);
  const MaskBlock block{end - first, static_cast<uint32_t>(masks.size()), masks.data()};
  const uint8_t* shared = shared_part(job, first, end);
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

bool Decoder::is_coded(uint32_t task, uint32_t tensor) const {
  if (index_.tensors[tensor].alias != kNone) return false;
  const EntryRecord& e = index_.entry(task, tensor);
  if (e.coding != Coding::Mask && e.coding != Coding::Ternary) return false;
  const auto planes = planes_of(index_, task, tensor);
  return index_.planes[e.plane].coding != PlaneCoding::Raw &&
         std::all_of(planes.begin(), planes.end(), [&](uint32_t p) { return is_known(index_.planes[p]); });
}

void Decoder::try_plane(uint32_t task, uint32_t tensor) const {
  const EntryRecord& e = index_.entry(task, tensor);
  const bool ternary = e.coding == Coding::Ternary;
  Job j{};
  j.elements = index_.elements(e.dims, e.rank);
  if (ternary) {
    use_ternary(j, e);
  } else {
    use_shared(j, index_.tensors[tensor]);
    j.masks = {mask_plane(e.plane)};
  }
  Buffers buffers;
  uint64_t set = 0;
  for (uint64_t first = 0; first < j.elements; first += kUnit) {
    const uint64_t end = std::min(first + kUnit, j.elements);
    const uint8_t* const mask = ternary ? unit_ternary(j, first, end, buffers).mask
                                        : unit_masks(j, first, end, buffers)[0];
    for (uint64_t i = 0; i < (end - first + 7) / 8; ++i) set += uint64_t(__builtin_popcount(mask[i]));
  }
  if (set != e.set_bits) {
    const char* const what = ternary ? " elements are not 0, its entry says " : " bits are set, its entry says ";
    unsound(ternary ? j.coded : j.masks[0].plane, Error(Status::Format, text(set, what, e.set_bits)));
  }
}

bool Decoder::intact(const PlaneBytes& plane, uint64_t block, const uint8_t* bytes) const {
  uint64_t size = std::min(kSumBlock, plane.size() - block * kSumBlock);
  return hash_block(kernels_, bytes, size) == index_.sums[plane.record->first_sum + block];
}

// Compares the hashes of whole blocks, which lie at [at, at + size).
void Decoder::compare(const PlaneBytes& plane, uint64_t at, uint64_t size, const uint64_t* hashes) const {
  for (uint64_t block = at / kSumBlock; block < (at + size) / kSumBlock; ++block) {
    if (*hashes++ != index_.sums[plane.record->first_sum + block]) damaged(plane, block);
  }
}

const uint8_t* Decoder::view(const PlaneBytes& plane, uint64_t at, uint64_t size,
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
void Decoder::check(const PlaneBytes& plane, const uint8_t* bytes, uint64_t at, uint64_t size) const {
  if (!options_.verify || plane.loaded) return;
  uint64_t end = at + size;
  for (uint64_t block = at / kSumBlock; block * kSumBlock < end; ++block) {
    if (!intact(plane, block, bytes + static_cast<int64_t>(block * kSumBlock - at))) damaged(plane, block);
  }
}

void Decoder::damaged(const PlaneBytes& plane, uint64_t block) const {
  if (plane.record->coding == PlaneCoding::External) {
    throw Error(Status::BaseMismatch,
                text(file_.label(), ": the base that was given is not the one the file was ",
                     "encoded against: it differs in ", file_.describe(plane.id)));
  }
  throw Error(Status::Checksum, text(file_.label(), ": damaged: wrong checksum in the ",
                                     file_.describe(plane.id), ", block ", block));
}

// Bytes [begin, end) of a plane that the file holds, checked.
const uint8_t* Decoder::part(const PlaneBytes& plane, uint64_t begin, uint64_t end) const {
  const uint8_t* bytes = plane.source.memory + begin;
  check(plane, bytes, begin, end - begin);
  return bytes;
}

// A block of a coded plane, checked: its bytes and how many there are.
std::pair<const uint8_t*, uint64_t> Decoder::block(const PlaneBytes& plane, const CodedBlocks& blocks,
                                                   uint64_t number) const {
  std::pair<const uint8_t*, uint64_t> found;
  try {
    found = blocks.block(number);
  } catch (const Error& e) {  // the file has changed since it was opened
    unsound(plane, e);
  }
  check(plane, found.first, uint64_t(found.first - plane.source.memory), found.second);
  return found;
}

// The shared vector of elements [begin, end) of a unit. Where masks are coded, unit_masks checks it.
const uint8_t* Decoder::shared_part(const Job& job, uint64_t begin, uint64_t end) const {
  const uint64_t size = size_of(job.block.shared_dtype);
  return job.has_coded_masks() ? job.shared.source.memory + begin * size
                               : part(job.shared, begin * size, end * size);
}

// The int8 scales of elements [first, end), if there are any; `first` begins a unit.
const float* Decoder::shared_scales(const Job& job, uint64_t first, uint64_t end) const {
  if (!job.shared_scales.record) return nullptr;
  return reinterpret_cast<const float*>(
      part(job.shared_scales, first / kScaleBlock * 4, (end + kScaleBlock - 1) / kScaleBlock * 4));
}

// The masks of elements [first, end) of a unit; those that are coded lie in the buffers then.
std::vector<const uint8_t*> Decoder::unit_masks(const Job& job, uint64_t first, uint64_t end,
                                                Buffers& buffers) const {
  static_assert(kMaskBlock == kUnit);
  std::vector<const uint8_t*> masks;
  SharedBlock shared{};
  if (job.has_coded_masks()) {
    const uint64_t size = size_of(job.block.shared_dtype);
    shared = {part(job.shared, first * size, end * size), job.block.shared_dtype,
              shared_scales(job, first, end)};
    buffers.coded.resize(std::max(buffers.coded.size(), job.masks.size()));
  }
  for (size_t k = 0; k < job.masks.size(); ++k) {
    const auto& [plane, coded] = job.masks[k];
    if (!coded) {
      masks.push_back(part(plane, first / 8, (end + 7) / 8));
      continue;
    }
    buffers.coded[k].resize((end - first + 7) / 8);
    const auto [bytes, size] = block(plane, *coded, first / kMaskBlock);
    try {
      decode_mask(bytes, size, shared, end - first, kernels_, buffers.coded[k].data());
    } catch (const Error& e) {
      unsound(plane, e);
    }
    masks.push_back(buffers.coded[k].data());
  }
  return masks;
}

// The mask to decode elements [first, end) with.
const uint8_t* Decoder::consensus(const Job& job, uint64_t first, uint64_t end,
                                  Buffers& buffers) const {
  const std::vector<const uint8_t*> masks = unit_masks(job, first, end, buffers);
  if (masks.size() == 1 && job.min_tasks == 1) return masks[0];
  buffers.mask.assign((end - first + 7) / 8, 0xff);
  if (job.min_tasks > 0) {
    const MaskBlock block{end - first, static_cast<uint32_t>(masks.size()), masks.data()};
    kernels_.consensus(block, job.min_tasks, buffers.mask.data());
  }
  return buffers.mask.data();
}

// The bits of elements [first, end) of a unit: those that are not 0, and those that are -1.
Decoder::Ternary Decoder::unit_ternary(const Job& job, uint64_t first, uint64_t end,
                                       Buffers& buffers) const {
  const uint64_t size = (end - first + 7) / 8;
  if (!job.ternary) {
    const uint64_t signs = job.coded.record->raw_size / 2;
    return {part(job.coded, first / 8, first / 8 + size),
            part(job.coded, signs + first / 8, signs + first / 8 + size)};
  }
  static_assert(kUnit % kTernaryBlock == 0);
  buffers.mask.resize(size);
  buffers.signs.resize(size);
  for (uint64_t at = first; at < end; at += kTernaryBlock) {
    const uint64_t number = at / kTernaryBlock, byte = (at - first) / 8;
    const auto [bytes, size] = block(job.coded, job.ternary->blocks(), number);
    try {
      job.ternary->decode(bytes, size, number, &buffers.mask[byte], &buffers.signs[byte]);
    } catch (const Error& e) {
      unsound(job.coded, e);
    }
  }
  return {buffers.mask.data(), buffers.signs.data()};
}

void Decoder::decode_unit(const Job& job, uint64_t unit, Buffers& buffers) const {
  const uint64_t first = unit * kUnit, end = std::min(first + kUnit, job.elements);
  const uint64_t wanted = std::max(first, job.first), wanted_end = std::min(end, job.end);
  const bool ternary = job.coding == Coding::Ternary;
  const uint32_t base_size = size_of(job.block.base_dtype);
  const uint32_t shared_size = ternary ? base_size : size_of(job.block.shared_dtype);
  // Whole checksum blocks of base and shared, small enough to stay in cache from check to kernel.
  const uint64_t step = kSumBlock / std::min(base_size, shared_size);
  const Ternary packed = ternary ? unit_ternary(job, first, end, buffers)
                                 : Ternary{consensus(job, first, end, buffers), nullptr};
  const float* int8_scales = shared_scales(job, first, end);
  const float* row_scales = nullptr;
  const uint64_t first_row = first / job.row_length;
  if (job.row_scales.record) {
    uint64_t rows_end = (end - 1) / job.row_length + 1;
    row_scales = reinterpret_cast<const float*>(part(job.row_scales, first_row * 4, rows_end * 4));
  }

  for (uint64_t at = wanted / step * step; at < wanted_end; at += step) {
    const uint64_t stop = std::min(at + step, end);
    const uint8_t* base = view(job.base, at * base_size, (stop - at) * base_size, buffers.base);
    const auto block_of = [&](uint64_t i, uint64_t n) {
      DecodeBlock block = job.block;
      block.n = n;
      block.phase = i % kScaleBlock;
      const uint64_t bits = (i - block.phase - first) / 8;
      block.base = base + (i - at) * base_size;
      block.mask = packed.mask + bits;
      block.shared = ternary ? packed.signs + bits : job.shared.source.memory + i * shared_size;
      if (int8_scales) block.shared_scales = int8_scales + (i - block.phase - first) / kScaleBlock;
      block.out = static_cast<uint8_t*>(job.request->out) + (i - job.first) * size_of(block.out_dtype);
      return block;
    };
    if (options_.verify && stop - at == step && at >= wanted && stop <= wanted_end && !row_scales) {
      uint64_t base_hashes[4], shared_hashes[4];
      kernels_.decode_hashed(block_of(at, step), base_hashes, shared_hashes);
      compare(job.base, at * base_size, step * base_size, base_hashes);
      if (!ternary) compare(job.shared, at * shared_size, step * shared_size, shared_hashes);
      continue;
    }
    check(job.base, base, at * base_size, (stop - at) * base_size);
    if (!ternary) shared_part(job, at, stop);

    const uint64_t last = std::min(stop, wanted_end);
    for (uint64_t i = std::max(at, wanted); i < last;) {
      const uint64_t row = i / job.row_length, row_end = std::min((row + 1) * job.row_length, last);
      DecodeBlock block = block_of(i, row_end - i);
      if (row_scales) block.scale = row_scales[row - first_row];
      kernels_.decode(block);
      i = row_end;
    }
  }
}

void Decoder::load_part(const Job& job, uint64_t number, Buffers& buffers, Loaded& to) const {
  const uint64_t first = number * job.part_size(), end = std::min(first + job.part_size(), job.end);
  const auto look_at = [&](const PlaneBytes& plane, uint32_t size) {
    for (uint64_t at = first * size; at < end * size; at += kSumBlock) {
      const uint64_t n = std::min(kSumBlock, end * size - at);
      check(plane, view(plane, at, n, buffers.base), at, n);
    }
  };
  if (job.coding == Coding::Base) return look_at(job.copied, job.element_size);
  if (job.coding == Coding::Verbatim) {
    std::vector<uint8_t>& plane = to.planes.at(job.copied.id);
    if (job.copied.coding() == PlaneCoding::Zstd) return inflate(job.copied, plane.data());
    const uint64_t begin = first * job.element_size;
    return copy(job.copied, begin, end * job.element_size, &plane[begin], buffers.base);
  }
  look_at(job.base, size_of(job.block.base_dtype));
  const uint64_t size = (end - first + 7) / 8;
  if (job.coding == Coding::Ternary) {
    const Ternary bits = unit_ternary(job, first, end, buffers);
    std::vector<uint8_t>& plane = to.planes.at(job.coded.id);
    std::memcpy(&plane[first / 8], bits.mask, size);
    std::memcpy(&plane[plane.size() / 2 + first / 8], bits.signs, size);
    return;
  }
  shared_part(job, first, end);
  shared_scales(job, first, end);
  std::memcpy(&to.planes.at(job.masks[0].plane.id)[first / 8], unit_masks(job, first, end, buffers)[0], size);
  if (first == 0 && job.row_scales.record) {
    std::vector<uint8_t>& scales = to.planes.at(job.row_scales.id);
    std::memcpy(scales.data(), part(job.row_scales, 0, scales.size()), scales.size());
  }
}

// A zstd plane; `out` has its raw size.
void Decoder::inflate(const PlaneBytes& plane, uint8_t* out) const {
  const PlaneRecord& p = *plane.record;
  check(plane, plane.source.memory, 0, p.size);
  if (!options_.inflate) {
    throw Error(Status::Argument, text(file_.label(), ": ", file_.describe(plane.id),
                                       " is a zstd frame, and no decompressor was given"));
  }
  try {
    options_.inflate(plane.source.memory, p.size, out, p.raw_size);
  } catch (const Error& e) {
    unsound(plane, e);
  }
}

// Bytes [begin, end) of a plane that is as it is.
void Decoder::copy(const PlaneBytes& plane, uint64_t begin, uint64_t end, uint8_t* out,
                   std::vector<uint8_t>& buffer) const {
  for (uint64_t at = begin / kSumBlock * kSumBlock; at < end; at += kSumBlock) {
    const uint64_t size = std::min(kSumBlock, plane.record->raw_size - at);
    const uint8_t* bytes = view(plane, at, size, buffer);
    check(plane, bytes, at, size);
    const uint64_t from = std::max(begin, at), to = std::min(end, at + size);
    std::memcpy(out + (from - begin), bytes + (from - at), to - from);
  }
}

void Decoder::copy_part(const Job& job, uint64_t part, Buffers& buffers) const {
  const uint64_t size = job.element_size;
  const uint64_t begin = std::max(part * job.part_size(), job.first) * size;
  const uint64_t end = std::min((part + 1) * job.part_size(), job.end) * size;
  uint8_t* const out = static_cast<uint8_t*>(job.request->out) + (begin - job.first * size);
  if (job.copied.coding() != PlaneCoding::Zstd) {
    copy(job.copied, begin, end, out, buffers.base);
  } else if (end - begin == job.copied.record->raw_size) {
    inflate(job.copied, out);
  } else {
    buffers.base.resize(job.copied.record->raw_size);
    inflate(job.copied, buffers.base.data());
    std::memcpy(out, buffers.base.data() + begin, end - begin);
  }
}

std::vector<uint8_t> Decoder::whole_plane(uint32_t id) const {
  const PlaneBytes plane = known_plane(id);
  std::vector<uint8_t> out(plane.record->raw_size), unused;
  if (plane.record->coding == PlaneCoding::Zstd) {
    inflate(plane, out.data());
  } else {
    copy(plane, 0, out.size(), out.data(), unused);
  }
  return out;
}

}  // namespace tallcodec
