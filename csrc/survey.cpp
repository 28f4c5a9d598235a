#include "survey.h"

#include <algorithm>
#include <atomic>

#include "mask_math.h"
#include "merge.h"
#include "parallel.h"

namespace tallcodec {
namespace {

constexpr uint64_t kStep = 16384;  // elements at a time, so that what is read of a few stays in cache

// The tasks that are coded somewhere, of the first trial, and the passes over their values.
class Surveyor {
 public:
  Surveyor(Draft& draft, const Options& options)
      : draft_(draft),
        options_(options),
        tasks_(static_cast<uint32_t>(draft.tasks.size() / draft.recipe.trials)),
        workers_(std::max(1u, options.threads)) {}

  // Runs visit(tensor, block, worker) on every stretch of the coded tensors' values.
  template <class Visit>
  void pass(const Survey& so_far, Visit visit) {
    std::vector<std::vector<uint32_t>> tasks;
    std::vector<Reading> items;
    for (const DraftTensor& t : draft_.tensors) tasks.push_back(draft_.read_tasks(t));
    for (size_t i = 0; i < tasks.size(); ++i) {
      const DraftTensor& t = draft_.tensors[i];
      for (uint64_t unit = 0; !tasks[i].empty() && unit < t.units(); ++unit) items.push_back({t, unit, tasks[i]});
    }
    std::vector<Values> values(workers_);
    const auto itself = [](const Reading& reading) -> const Reading& { return reading; };
    for_each_reading(items, options_, "surveying", itself, [&](const Reading& reading, unsigned w) {
      const DraftTensor& t = reading.tensor;
      const uint64_t first = reading.unit * kUnit, end = std::min(first + kUnit, t.elements());
      const Merger merger(draft_, t, so_far);
      values[w].open(draft_, t);
      for (uint64_t at = first; at < end; at += kStep) {
        const uint64_t n = std::min(kStep, end - at);
        values[w].read(at, n);
        visit(t, merger.block(values[w], n), w);
      }
    });
  }

  // Makes verbatim what holds NaN or infinity: no other pass is to meet it.
  void leave_out_nonfinite() {
    struct Found {
      std::atomic<bool> base{false};
      std::vector<std::atomic<bool>> task;
    };
    std::vector<Found> found(draft_.tensors.size());
    for (size_t i = 0; i < found.size(); ++i) {
      found[i].task = std::vector<std::atomic<bool>>(draft_.tensors[i].coded().size());
    }
    pass({}, [&](const DraftTensor& t, const MergeBlock& b, unsigned) {
      Found& f = found[static_cast<size_t>(&t - draft_.tensors.data())];
      if (has_nonfinite(b.base, b.base_dtype, b.n)) f.base = true;
      for (uint32_t k = 0; k < b.tasks; ++k) {
        if (has_nonfinite(b.task[k], b.task_dtype[k], b.n)) f.task[k] = true;
      }
    });
    for (size_t i = 0; i < found.size(); ++i) {
      std::vector<uint8_t> flags(found[i].task.size());
      const size_t first_trial = flags.size() / draft_.recipe.trials;
      for (size_t k = 0; k < flags.size(); ++k) flags[k] = found[i].task[k % first_trial];
      draft_.leave_out(draft_.tensors[i], found[i].base, flags);
    }
  }

  // Per task, the smallest of the `density` largest magnitudes of its whole task vector, as the
  // code of TIES counts them: d - floor(density * d) are smaller, or as large.
  std::vector<float> find_cuts(double density) {
    std::vector<uint64_t> rank(tasks_), zeros(tasks_);
    std::vector<bool> all(tasks_);
    for (uint32_t k = 0; k < tasks_; ++k) {
      uint64_t elements = 0;
      for (const DraftTensor& t : draft_.tensors) {
        if (t.record.alias != kNone || !is_arithmetic(t.record.dtype)) continue;
        const Coding coding = t.entries[k].record.coding;
        if (coding == Coding::Base) zeros[k] += t.elements();
        if (coding == Coding::Base || coding == Coding::Mask) elements += t.elements();
      }
      const auto kept = static_cast<uint64_t>(static_cast<double>(elements) * density);
      all[k] = kept >= elements;
      rank[k] = all[k] ? 0 : elements - kept - 1;
    }
    const std::vector<uint64_t> upper_counts = count({}, zeros);
    std::vector<uint32_t> upper(tasks_);
    for (uint32_t k = 0; k < tasks_; ++k) {
      upper[k] = find_bin(&upper_counts[uint64_t{k} * kBins], rank[k]);
      // Zeros count in full; they are the least of their bin.
      if (upper[k] != 0) zeros[k] = 0;
    }
    const std::vector<uint64_t> lower_counts = count(upper, zeros);
    std::vector<float> cut(tasks_);
    for (uint32_t k = 0; k < tasks_; ++k) {
      const uint32_t lower = find_bin(&lower_counts[uint64_t{k} * kBins], rank[k]);
      cut[k] = all[k] ? 0 : float_of(upper[k] << 16 | lower);
    }
    return cut;
  }

  int64_t count_signs(const Survey& cuts) {
    std::atomic<int64_t> votes{0};
    pass(cuts, [&](const DraftTensor&, const MergeBlock& b, unsigned) {
      votes += tallcodec::count_signs(b);
    });
    return votes;
  }

 private:
  // [task][bin]: how many of its magnitudes have those upper 16 bits; or given these, per task, of
  // the magnitudes that have them, those lower 16 bits.
  std::vector<uint64_t> count(const std::vector<uint32_t>& upper,
                              const std::vector<uint64_t>& zeros) {
    std::vector<std::vector<uint64_t>> counts(workers_);
    for (auto& bins : counts) bins.resize(uint64_t{tasks_} * kBins);
    pass({}, [&](const DraftTensor& t, const MergeBlock& b, unsigned worker) {
      const std::vector<uint32_t> coded = t.coded();
      for (uint32_t k = 0; k < b.tasks; ++k) {
        count_magnitudes(b, k, upper.empty() ? kAnyUpper : upper[coded[k]],
                         &counts[worker][uint64_t{coded[k]} * kBins]);
      }
    });
    for (unsigned w = 1; w < workers_; ++w) {
      std::transform(counts[0].begin(), counts[0].end(), counts[w].begin(), counts[0].begin(),
                     std::plus<>());
    }
    for (uint32_t k = 0; k < tasks_; ++k) counts[0][uint64_t{k} * kBins] += zeros[k];
    return std::move(counts[0]);
  }

  Draft& draft_;
  const Options& options_;
  const uint32_t tasks_;
  const unsigned workers_;
};

// The tasks that a mean over all is a mean of: those of masks that have the tensor in arithmetic.
uint32_t averaged(const Draft& d, const DraftTensor& t) {
  uint32_t count = 0;
  for (size_t k = 0; k < d.tasks.size() / d.recipe.trials; ++k) {
    const Coding coding = t.entries[k].record.coding;
    count += d.tasks[k].method != Method::Ternary &&
             (coding == Coding::Base || coding == Coding::Mask);
  }
  return count;
}

}  // namespace

Merger::Merger(const Draft& draft, const DraftTensor& tensor, const Survey& survey) {
  if (!survey.cut.empty()) {
    for (uint32_t k : tensor.coded()) cuts_.push_back(survey.cut[k % survey.cut.size()]);
  }
  block_.base_dtype = tensor.record.dtype;
  block_.rule = draft.recipe.merge;
  block_.averaged = averaged(draft, tensor);
  block_.majority = survey.majority;
}

MergeBlock Merger::block(const Values& values, uint64_t n) const {
  MergeBlock block = block_;
  block.n = n;
  block.base = values.base;
  block.tasks = static_cast<uint32_t>(values.task.size());
  block.task = values.task.data();
  block.task_dtype = values.dtype.data();
  block.cut = cuts_.data();
  return block;
}

Survey survey(Draft& draft, const Options& options) {
  const Recipe& recipe = draft.recipe;
  const bool ties = recipe.merge == Merge::Ties;
  if (draft.original) return {};  // whose shared vectors are made
  if (!ties && recipe.method != Method::Magnitude) return {};
  Surveyor surveyor(draft, options);
  Survey found;
  surveyor.leave_out_nonfinite();
  found.cut = surveyor.find_cuts(recipe.density);
  if (ties && surveyor.count_signs(found) > 0) found.majority = 1;
  return found;
}

}  // namespace tallcodec
