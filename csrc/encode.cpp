// Plan and kernels to planes.
#include "encode.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <mutex>

#include "adapt.h"
#include "draft.h"
#include "float_environment.h"
#include "merge.h"
#include "moments.h"
#include "pack.h"
#include "parallel.h"
#include "rans.h"
#include "sparsify.h"
#include "survey.h"
#include "text.h"

namespace tallcodec {
namespace {

// What the units of one coded tensor leave for its end, when they can be put in order.
struct Progress {
  explicit Progress(const DraftTensor& t, bool per_row)
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

// What a thread keeps from unit to unit.
struct Buffers {
  Values values;
  std::vector<uint8_t> copied, shared;
  std::vector<std::vector<uint8_t>> mask;
  std::vector<float> merged;
};

// Copies a unit of a tensor of so many elements, of a task or of the base, as it is.
void copy_unit(Draft& d, const DraftTensor& t, uint32_t task, uint32_t plane, uint64_t elements, uint64_t unit,
               std::vector<uint8_t>& buffer) {
  const uint64_t first = unit * kUnit, n = std::min(kUnit, elements - first);
  const uint64_t size = size_of(task == kNone ? t.record.dtype : t.entries[task].record.dtype);
  d.put(plane, first * size, elements_of(d, t, task, first, n, buffer), n * size);
}

// The moments of the parts of rows within a unit that was encoded in one block.
std::vector<Moments> row_segments(const Kernels& kernels, const Progress& progress,
                                  uint64_t first, const EncodeBlock& unit, uint32_t k,
                                  const std::vector<uint8_t>& mask) {
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
    part.mask = mask.data() + aligned / 8;
    part.scale = 1;
    Sums sums{};
    kernels.sums(part, at_element(unit.task[k], unit.task_dtype[k], at), unit.task_dtype[k], sums);
    segments.push_back(moments(sums));
    at = end;
  }
  return segments;
}

MaskRule rule_of(Method method) {
  switch (method) {
    case Method::Tall: return MaskRule::Published;
    case Method::Magnitude: return MaskRule::Magnitude;
    default: return MaskRule::Adapted;
  }
}

// The parameter of a coded task's rule for its mask.
float threshold_of(const Draft& d, const DraftTensor& t, uint32_t task) {
  switch (d.recipe.method) {
    case Method::Tall: return d.tasks[task].threshold;
    // The kernels ask for more than the threshold, and the cut itself is kept.
    case Method::Magnitude: return std::nextafter(d.tasks[task].threshold, -1.0f);
    default: return t.entries[task].record.factor;
  }
}

void encode_unit(Draft& d, const DraftTensor& t, const Survey& survey, Progress& progress,
                 uint64_t unit, Buffers& buffers) {
  const auto& coded = progress.tasks;
  const auto count = static_cast<uint32_t>(coded.size());  // of all trials
  const uint32_t in_trial = count / d.recipe.trials;
  const uint64_t first = unit * kUnit, n = std::min(kUnit, t.elements() - first);
  // A shared vector that is there already is taken as a decoder has it, not stored anew.
  const bool stored = t.is_stored();
  const DType shared_dtype = stored ? DType::F32 : t.shared_dtype;
  const uint32_t base_size = size_of(t.record.dtype), shared_size = size_of(shared_dtype);
  const bool per_row = d.recipe.scale == ScaleMode::UnitGainRow;
  // As many elements at a time as fill a checksum block of the base: the buffers of a few tasks
  // then stay in cache from read to kernel. Scales per row look at a unit's values once more, so
  // they keep it whole.
  const uint64_t step = per_row ? kUnit : kSumBlock / base_size;

  buffers.shared.resize(kUnit * shared_size);
  buffers.mask.resize(std::max<size_t>(buffers.mask.size(), count));
  buffers.values.open(d, t);
  const Values& values = buffers.values;

  std::vector<float> thresholds(count);
  std::vector<uint8_t*> masks(count);
  std::vector<TaskStats> stats(count);
  std::vector<uint64_t> agreement(count + 1);
  for (uint32_t k = 0; k < count; ++k) {
    thresholds[k] = threshold_of(d, t, coded[k]);
    buffers.mask[k].resize(kUnit / 8);
  }

  const Merger merger(d, t, survey);
  EncodeBlock block{};
  block.tasks = in_trial;
  block.base_dtype = t.record.dtype;
  block.task = values.task.data();
  block.task_dtype = values.dtype.data();
  block.shared_dtype = shared_dtype;
  block.rule = rule_of(d.recipe.method);
  block.agreement = agreement.data();

  for (uint64_t at = 0; at < n; at += step) {
    block.n = std::min(step, n - at);
    buffers.values.read(first + at, block.n);
    block.base = values.base;
    block.shared = buffers.shared.data() + at * shared_size;
    if (shared_dtype == DType::I8) {
      block.shared_scales = progress.shared_scales.data() + (first + at) / kScaleBlock;
    }
    if (stored || d.recipe.merge != Merge::TaskArithmetic) {  // the kernels add up themselves
      buffers.merged.resize(std::max<size_t>(buffers.merged.size(), block.n));
      if (stored) {
        read_shared(d, t, first + at, block.n, buffers.merged.data());
      } else {
        merge(merger.block(values, block.n), buffers.merged.data());
      }
      block.merged = buffers.merged.data();
    }
    for (uint32_t k = 0; k < count; ++k) masks[k] = buffers.mask[k].data() + at / 8;
    for (uint32_t k = 0; k < count; k += in_trial) {
      block.threshold = &thresholds[k];
      block.mask = &masks[k];
      block.stats = &stats[k];
      d.kernels->encode(block);
    }
    if (!stored) d.put(t.record.base_plane, (first + at) * base_size, block.base, block.n * base_size);
  }
  if (!stored) d.put(t.record.shared_plane, first * shared_size, buffers.shared.data(), n * shared_size);
  for (uint32_t k = 0; k < count; ++k) {
    d.put(t.entries[coded[k]].record.plane, first / 8, buffers.mask[k].data(), (n + 7) / 8);
  }

  for (uint32_t k = 0; k < count; ++k) {
    auto& segments = progress.segments[k * progress.units + unit];
    if (per_row) {
      segments = row_segments(*d.kernels, progress, first, block, k % in_trial, buffers.mask[k]);
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

// Fills in a coded tensor's entries once all its units are done. True: NaN or infinity turned up in
// some task, which is verbatim now, and the others are to be encoded again without it.
bool settle(Draft& d, DraftTensor& t, Progress& progress) {
  const bool left_out = d.leave_out(t, progress.base_nonfinite, progress.nonfinite);
  if (t.coded().empty()) return false;
  if (left_out) return true;

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
      scales.push_back(d.recipe.scale == ScaleMode::None ? 1.0f : unit_gain(row));
      total.add(scaled(row, scales.back()));
    }
    EntryRecord& e = t.entries[progress.tasks[k]].record;
    if (e.scales_plane != kNone) {
      d.put(e.scales_plane, 0, scales.data(), scales.size() * sizeof(float));
    } else {
      e.scale = scales[0];
    }
    e.set_bits = progress.set_bits[k];
    e.published_bits = progress.published_bits[k];
    e.tau_sq = total.tau_sq;
    e.dot = total.dot;
    e.approx_sq = total.approx_sq;
  }
  if (t.is_stored()) return false;  // its counts would take the other tasks
  if (t.shared_dtype == DType::I8) {
    d.put(t.record.shared_scales_plane, 0, progress.shared_scales.data(),
        progress.shared_scales.size() * sizeof(float));
  }
  t.counts = progress.counts;
  return false;
}

// The planes that are reserved for each tensor.
std::vector<std::vector<uint32_t>> reserved_planes(const Draft& d) {
  std::vector<std::vector<uint32_t>> all;
  for (const DraftTensor& t : d.tensors) {
    std::vector<uint32_t> planes{t.record.base_plane, t.record.shared_plane, t.record.shared_scales_plane};
    for (const DraftEntry& e : t.entries) {
      if (t.record.alias == kNone) planes.insert(planes.end(), {e.record.plane, e.record.scales_plane});
    }
    planes.erase(std::remove(planes.begin(), planes.end(), kNone), planes.end());
    all.push_back(std::move(planes));
  }
  return all;
}

// What the journal has of it, or a new survey.
Survey surveyed(Draft& d, const std::vector<std::vector<uint32_t>>& planes, const Options& options) {
  Survey found;
  if (d.journal.has(Journal::Step::Surveyed)) {
    const std::string& note = d.journal.note(Journal::Step::Surveyed);
    std::memcpy(&found.majority, note.data(), sizeof(float));
    found.cut.resize(note.size() / sizeof(float) - 1);
    std::memcpy(found.cut.data(), note.data() + sizeof(float), found.cut.size() * sizeof(float));
    return found;
  }
  found = survey(d, options);
  if (found.cut.empty()) return found;
  Journal::Changes changes;
  for (uint32_t i = 0; i < d.tensors.size(); ++i) {
    changes.tensors.push_back(i);
    for (uint32_t plane : planes[i]) {
      if (d.planes[plane].dropped) changes.planes.push_back(plane);
    }
  }
  append(changes.note, found.majority);
  for (float cut : found.cut) append(changes.note, cut);
  d.journal.add(Journal::Step::Surveyed, 0, d, changes);
  return found;
}

}  // namespace

Encoder::Encoder(int fd, std::string label, std::string writer, const Recipe& recipe)
    : draft_(std::make_unique<Draft>()) {
  draft_->fd = fd;
  draft_->label = std::move(label);
  draft_->writer = std::move(writer);
  draft_->recipe = recipe;
}
Encoder::~Encoder() = default;

void Encoder::keep_journal(int fd, std::string label, std::string maker) {
  draft_->journal = Journal(fd, std::move(label), std::move(maker));
}

uint32_t Encoder::add_task(std::string name, float threshold, bool ternary) {
  const Method method = ternary ? Method::Ternary : draft_->recipe.method;
  draft_->tasks.push_back({std::move(name), threshold, method});
  for (DraftTensor& t : draft_->tensors) {
    t.entries.emplace_back();
    if (t.record.alias == kNone) t.entries.back().record = absent_entry();
  }
  return static_cast<uint32_t>(draft_->tasks.size() - 1);
}

void Encoder::extend(std::vector<uint32_t> kept, const std::vector<std::string>& more,
                     const std::vector<std::string>& untied) {
  Draft& d = *draft_;
  adopt(d, std::move(kept), more, untied);
  // What an interrupted change has left is not to be between the planes. Whoever looks at the file's size sees from
  // now on that it is being changed, and never the old size.
  d.resize(d.end + kAlign);
  d.clear(d.end, kAlign);
}

void Encoder::set_base(uint32_t tensor, Source base) { draft_->tensors.at(tensor).base = base; }

void Encoder::check_stored(const Options& options) const { tallcodec::check_stored(*draft_, options); }

void Encoder::withdraw() const { tallcodec::withdraw(*draft_); }

Encoder::Cost Encoder::cost(uint32_t task) const {
  const Draft& d = *draft_;
  Cost cost;
  const auto add_plane = [&](uint32_t plane) {
    if (plane != kNone) cost.bits += 8 * static_cast<double>(d.planes[plane].record.size);
  };
  for (const DraftTensor& t : d.tensors) {
    if (t.record.alias != kNone) continue;
    const EntryRecord& e = t.entries[task].record;
    const bool coded = e.coding == Coding::Mask || e.coding == Coding::Ternary;
    const bool zero = e.coding == Coding::Base && is_arithmetic(t.record.dtype);
    if (coded || zero) cost.elements += static_cast<double>(t.elements());
    if (!coded) continue;
    add_plane(e.plane);
    add_plane(e.scales_plane);
    Moments m{e.tau_sq, e.dot, e.approx_sq};
    if (e.coding == Coding::Mask && d.recipe.scale == ScaleMode::None) m = scaled(m, unit_gain(m));
    cost.tau_sq += m.tau_sq;
    cost.error_sq += m.tau_sq - 2 * m.dot + m.approx_sq;
  }
  return cost;
}

uint32_t Encoder::add_tensor(std::string name, bool in_base, DType dtype,
                             std::vector<uint64_t> shape, DType shared_dtype, Source base,
                             uint32_t alias) {
  DraftTensor t;
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
  for (DraftEntry& e : t.entries) {
    if (alias == kNone) e.record = absent_entry();
  }
  draft_->tensors.push_back(std::move(t));
  return static_cast<uint32_t>(draft_->tensors.size() - 1);
}

void Encoder::set_entry(uint32_t task, uint32_t tensor, Coding coding, DType dtype,
                        std::vector<uint64_t> shape, Reason reason, Source source) {
  DraftEntry& e = draft_->tensors.at(tensor).entries.at(task);
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
  FloatEnvironment environment;  // statistics and scales round as the kernels do
  d.kernels = options.kernels ? options.kernels : &require_kernels();
  d.place();
  const auto planes = reserved_planes(d);
  d.journal.restore(d, options);
  const Survey found = surveyed(d, planes, options);
  if (d.recipe.method == Method::Magnitude) {
    for (size_t k = 0; k < d.tasks.size(); ++k) {
      if (d.tasks[k].method == Method::Magnitude) d.tasks[k].threshold = found.cut[k];
    }
  } else if (d.recipe.method == Method::Adapted) {
    for (DraftTask& task : d.tasks) {
      if (task.method == Method::Adapted) task.threshold = static_cast<float>(kNear);
    }
  }

  struct Item {
    uint32_t tensor;
    uint64_t unit;
  };
  std::vector<uint32_t> left;  // tensors that are not encoded yet
  for (uint32_t i = 0; i < d.tensors.size(); ++i) {
    const DraftTensor& t = d.tensors[i];
    const bool to_do = t.is_stored() ? !t.coded().empty() : t.record.base_plane != kNone;
    if (to_do && !d.journal.has(Journal::Step::Encoded, i)) left.push_back(i);
  }
  std::vector<std::unique_ptr<Progress>> progress(d.tensors.size());
  std::vector<Buffers> buffers(std::max(1u, options.threads));
  std::mutex mutex;

  while (!left.empty()) {
    std::vector<Item> items;
    std::vector<uint32_t> coded, again;
    for (uint32_t i : left) {
      if (!d.tensors[i].coded().empty()) coded.push_back(i);
      for (uint64_t u = 0; u < d.tensors[i].units(); ++u) items.push_back({i, u});
    }
    if (d.recipe.method == Method::Adapted) adapt(d, found, coded, options);
    std::vector<std::atomic<uint64_t>> done(d.tensors.size());
    std::vector<std::vector<uint32_t>> tasks(d.tensors.size());
    for (uint32_t i : left) tasks[i] = d.read_tasks(d.tensors[i]);
    const auto reading = [&](const Item& item) {
      return Reading{d.tensors[item.tensor], item.unit, tasks[item.tensor]};
    };
    for_each_reading(items, options, "encoding", reading, [&](const Item& item, unsigned worker) {
      DraftTensor& t = d.tensors[item.tensor];
      std::unique_ptr<Progress>& p = progress[item.tensor];
      if (t.coded().empty()) {
        copy_unit(d, t, kNone, t.record.base_plane, t.elements(), item.unit, buffers[worker].copied);
      } else {
        {
          std::lock_guard lock(mutex);
          if (!p) p = std::make_unique<Progress>(t, d.recipe.scale == ScaleMode::UnitGainRow);
        }
        encode_unit(d, t, found, *p, item.unit, buffers[worker]);
      }
      if (++done[item.tensor] < t.units()) return;
      const bool unsettled = p && settle(d, t, *p);
      p.reset();
      if (!unsettled) {
        d.journal.add(Journal::Step::Encoded, item.tensor, d, {planes[item.tensor], {item.tensor}, {}, {}});
        return;
      }
      std::lock_guard lock(mutex);
      again.push_back(item.tensor);
    });
    left = std::move(again);
  }
  if (d.recipe.code_masks) pack_masks(d, options);
  sparsify(d, options);
}

std::vector<Encoder::Pending> Encoder::verbatim() const {
  std::vector<Pending> pending;
  for (uint32_t k = 0; k < draft_->tasks.size(); ++k) {
    for (uint32_t i = 0; i < draft_->tensors.size(); ++i) {
      const DraftTensor& t = draft_->tensors[i];
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

void Encoder::copy_verbatim(uint32_t task, uint32_t tensor) {
  Draft& d = *draft_;
  DraftTensor& t = d.tensors.at(tensor);
  DraftEntry& e = t.entries.at(task);
  const uint64_t elements = std::accumulate(e.shape.begin(), e.shape.end(), uint64_t{1}, std::multiplies<>());
  if (!elements) return;
  e.record.plane = d.reserve(PlaneKind::Verbatim, elements * size_of(e.record.dtype));
  std::vector<uint8_t> buffer;
  for (uint64_t unit = 0; unit * kUnit < elements; ++unit) {
    copy_unit(d, t, task, e.record.plane, elements, unit, buffer);
  }
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

uint64_t Encoder::finish() { return draft_->finish(); }

}  // namespace tallcodec
