#include "sparsify.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <tuple>

#include "allocate.h"
#include "float_environment.h"
#include "mask_math.h"
#include "moments.h"
#include "pack.h"
#include "parallel.h"
#include "ternary.h"
#include "text.h"
#include "to_float32.h"

namespace tallcodec {
namespace {

// Magnitudes by exponent and four bits of fraction: sixteen bins in an octave.
constexpr uint32_t kBinShift = 19, kBins = 1 << (31 - kBinShift);
constexpr uint32_t kInfinity = 0x7f800000;
constexpr uint64_t kChunk = 16384;  // elements looked at together
static_assert(kUnit % kChunk == 0 && kUnit % kTernaryBlock == 0 && kChunk % kLanes == 0);
// Where the checkpoint is rounded to 16 bits, the scale is found from about as many elements, or up to twice
// as many, in as many steps. They are those of some chunks, which follow no pattern that a tensor may have.
constexpr uint64_t kSample = 1 << 15, kScatter = 2654435761;  // the golden section of 2^32
constexpr int kSearchSteps = 16;

// Some consecutive elements of a tensor, from number `first` on.
struct Chunk {
  uint64_t first, n;
  float base[kChunk], tau[kChunk];
  uint32_t bits[kChunk];  // of the magnitudes of tau
};

// Runs visit(chunk) over elements first .. end of a tensor; `first` begins a chunk.
template <class Visit>
void for_each_chunk(const Draft& d, const DraftTensor& t, uint32_t task, uint64_t first, uint64_t end,
                    Visit visit) {
  const auto chunk = std::make_unique<Chunk>();
  std::vector<uint8_t> buffer;
  for (; first < end; first += kChunk) {
    const uint64_t n = std::min(kChunk, end - first);
    chunk->first = first;
    chunk->n = n;
    to_float32(elements_of(d, t, kNone, first, n, buffer), t.record.dtype, n, chunk->base);
    to_float32(elements_of(d, t, task, first, n, buffer), t.entries[task].record.dtype, n, chunk->tau);
    for (uint64_t i = 0; i < n; ++i) {
      chunk->tau[i] -= chunk->base[i];
      chunk->bits[i] = float_bits(chunk->tau[i]) & 0x7fffffff;
    }
    visit(*chunk);
  }
}

// Magnitudes of one bin, added up exactly: their significands, for they have one exponent.
struct Tally {
  uint64_t count = 0, significands = 0;
};

uint32_t significand(uint32_t bits) { return (bits & 0x7fffff) | (bits >> 23 ? 0x800000 : 0); }

// What significands of a bin stand for.
double sum_of(uint32_t bin, uint64_t significands) {
  const uint32_t exponent = bin >> (23 - kBinShift);
  return std::ldexp(static_cast<double>(significands), static_cast<int>(std::max(exponent, 1u)) - 150);
}

// The elements kept: those whose magnitude has more than these bits and, of those that have just these,
// evenly spread, so many.
struct Cut {
  uint32_t bits = kInfinity;
  uint64_t above = 0, equal = 0, ties = 0;
  double sum = 0;  // of the magnitudes above

  double dot() const { return ties ? sum + static_cast<double>(ties) * float_of(bits) : sum; }
};

// What was met when elements were selected by a cut.
struct Found {
  uint64_t above = 0, equal = 0, ties = 0;  // ties: of those that are equal, the kept ones
  uint32_t largest = 0;                     // magnitude, by its bits
};

// A tensor of a task.
struct Candidate {
  uint32_t tensor = 0;
  uint64_t elements = 0, kept = 0;
  // What the first reading finds.
  std::vector<double> unit_tau_sq;
  double tau_sq = 0;
  bool finite = true, base_finite = true;
  std::vector<Bin> bins;
  std::vector<Point> hull;
  // The second.
  Cut cut;
  float scale = 1;
  // The third.
  std::vector<Moments> unit_moments;  // of a rounded checkpoint
  GapCounts gaps{};
  Found found;

  uint64_t units() const { return (elements + kUnit - 1) / kUnit; }
};

[[noreturn]] void changed(const Draft& d, uint32_t tensor, uint32_t task) {
  throw Error(Status::Read, text(who(d, d.tensors[tensor], task), ": it, or the base, was changed ",
                                 "while it was read"));
}

// Elements that are kept, in order.
struct Kept {
  std::vector<float> base, tau;

  // Those of a group of 64 of a chunk.
  void add(const Chunk& chunk, uint64_t group, uint64_t bits) {
    for (; bits; bits &= bits - 1) {
      const uint64_t i = group + static_cast<uint64_t>(__builtin_ctzll(bits));
      base.push_back(chunk.base[i]);
      tau.push_back(chunk.tau[i]);
    }
  }

  // Those of what is decoded with this scale, but for tau_sq; element j adds to lane j mod 16.
  Moments moments(float scale, DType dtype) const {
    switch (dtype) {
      case DType::F32: return sums(scale, [](float step, float) { return step; });
      case DType::F16: return sums(scale, [](float step, float b) {
        return f16_to_f32(f32_to_f16(b + step)) - b;
      });
      default: return sums(scale, [](float step, float b) {
        return bf16_to_f32(f32_to_bf16(b + step)) - b;
      });
    }
  }

 private:
  template <class Approx>
  Moments sums(float scale, Approx approx) const {
    double dot[kLanes] = {}, approx_sq[kLanes] = {};
    const auto add = [&](size_t i, size_t lane) {
      const double a = approx(tau[i] < 0 ? -scale : scale, base[i]);
      dot[lane] += tau[i] * a;
      approx_sq[lane] += a * a;
    };
    size_t i = 0;
    for (; i + kLanes <= tau.size(); i += kLanes) {
      for (size_t lane = 0; lane < kLanes; ++lane) add(i + lane, lane);
    }
    for (size_t lane = 0; i < tau.size(); ++i, ++lane) add(i, lane);
    return {0, add_lanes(dot), add_lanes(approx_sq)};
  }
};

// The scale with which the rounded checkpoint has this sum of tau * approx, or as near as sixteen
// halvings of two octaves around the scale without rounding come.
float corrected(const Kept& kept, float scale, double wanted, DType dtype) {
  const uint32_t middle = float_bits(scale), octaves = 2u << 23;
  uint32_t low = middle > octaves ? middle - octaves : 0;
  uint32_t high = std::min(middle + octaves, kInfinity - 1);
  double below = kept.moments(float_of(low), dtype).dot;
  double above = kept.moments(float_of(high), dtype).dot;
  for (int step = 0; step < kSearchSteps; ++step) {
    const uint32_t half = low + (high - low) / 2;
    const double dot = kept.moments(float_of(half), dtype).dot;
    if (dot < wanted) {
      low = half;
      below = dot;
    } else {
      high = half;
      above = dot;
    }
  }
  return float_of(wanted - below < above - wanted ? low : high);
}

// Which elements of a unit, or of a chunk alone, are kept.
class Selection {
 public:
  explicit Selection(const Cut& cut) : cut_(cut) {}

  // Those of the group of 64, or fewer, from element `at` of the chunk on, as bits, and those that are negative.
  std::pair<uint64_t, uint64_t> group(const Chunk& chunk, uint64_t at) {
    const uint64_t n = std::min<uint64_t>(64, chunk.n - at);
    uint64_t kept = 0, same = 0, negative = 0;
    for (uint64_t j = 0; j < n; ++j) {
      const uint32_t bits = chunk.bits[at + j];
      found_.largest = std::max(found_.largest, bits);
      kept |= uint64_t{bits > cut_.bits} << j;
      same |= uint64_t{bits == cut_.bits} << j;
      if (chunk.tau[at + j] < 0) negative |= uint64_t{1} << j;  // gcc 12 loses bits of a shifted bool under UBSan
    }
    found_.above += static_cast<uint64_t>(__builtin_popcountll(kept));
    for (; cut_.ties && same; same &= same - 1, ++found_.equal) {
      due_ += cut_.ties;
      if (due_ < cut_.equal) continue;
      due_ -= cut_.equal;
      ++found_.ties;
      kept |= same & -same;
    }
    return {kept, negative & kept};
  }

  void add_to(Found& found) const {
    found.above += found_.above;
    found.equal += found_.equal;
    found.ties += found_.ties;
    found.largest = std::max(found.largest, found_.largest);
  }

 private:
  const Cut& cut_;
  Found found_;
  uint64_t due_ = 0;
};

// The planes of one task.
class Sparsifier {
 public:
  Sparsifier(Draft& d, uint32_t task, const Options& options)
      : d_(d), task_(task), options_(options), alone_(d.tasks[task].method == Method::Ternary) {}

  void run() {
    uint64_t elements = 0;  // of the whole task vector
    for (uint32_t i = 0; i < d_.tensors.size(); ++i) {
      const DraftTensor& t = d_.tensors[i];
      const Coding coding = entry(i).coding;
      if (t.record.alias != kNone) continue;
      if (coding == Coding::Ternary) {
        candidates_.emplace_back();
        candidates_.back().tensor = i;
        candidates_.back().elements = t.elements();
      } else if (alone_ && coding == Coding::Base && is_arithmetic(t.record.dtype)) {
        elements += t.elements();
      }
    }
    look();
    for (const Candidate& c : candidates_) {
      if (!c.finite) d_.leave_out(entry(c.tensor), !c.base_finite);
    }
    candidates_.erase(std::remove_if(candidates_.begin(), candidates_.end(),
                                     [](const Candidate& c) { return !c.finite; }),
                      candidates_.end());
    for (const Candidate& c : candidates_) elements += c.elements;
    allocate_to(elements);
    find_cuts();
    const uint64_t begin = d_.end;
    write();
    if (d_.recipe.code_ternary) code(begin);
  }

 private:
  EntryRecord& entry(uint32_t tensor) { return d_.tensors[tensor].entries[task_].record; }
  const DraftTensor& tensor(const Candidate& c) const { return d_.tensors[c.tensor]; }
  size_t number(const Candidate& c) const { return static_cast<size_t>(&c - candidates_.data()); }

  // Runs visit(candidate, unit), and finish(candidate) once its last unit is done.
  template <class Visit, class Finish>
  void for_each_unit(const char* step, Visit visit, Finish finish) {
    for_each_unit(step, [](const Candidate&) { return true; }, visit, finish);
  }

  // The same for those candidates that are read.
  template <class Reads, class Visit, class Finish>
  void for_each_unit(const char* step, Reads reads, Visit visit, Finish finish) {
    std::vector<std::pair<Candidate*, uint64_t>> items;
    for (Candidate& c : candidates_) {
      if (!reads(c)) continue;
      for (uint64_t unit = 0; unit < c.units(); ++unit) items.emplace_back(&c, unit);
    }
    std::vector<std::atomic<uint64_t>> done(candidates_.size());
    const std::vector<uint32_t> tasks{task_};
    const auto reading = [&](const auto& item) { return Reading{tensor(*item.first), item.second, tasks}; };
    for_each_reading(items, options_, step, reading, [&](const auto& item, unsigned) {
      auto [c, unit] = item;
      visit(*c, unit);
      if (++done[number(*c)] == c->units()) finish(*c);
    });
  }

  template <class Visit>
  void for_each_chunk_of(const Candidate& c, uint64_t unit, Visit visit) const {
    for_each_chunk(d_, tensor(c), task_, unit * kUnit, std::min((unit + 1) * kUnit, c.elements), visit);
  }

  // The first reading: magnitudes by bin, and whether all is finite.
  void look() {
    std::vector<std::vector<Tally>> tallies(candidates_.size());
    for (Candidate& c : candidates_) c.unit_tau_sq.resize(c.units());
    for_each_unit("looking at magnitudes", [&](Candidate& c, uint64_t unit) {
      std::vector<Tally> tally(kBins);
      double lanes[kLanes] = {};
      bool finite = true, base_finite = true;
      for_each_chunk_of(c, unit, [&](const Chunk& chunk) {
        for (uint64_t i = 0; i < chunk.n; ++i) {
          const uint32_t bits = chunk.bits[i];
          Tally& bin = tally[bits >> kBinShift];
          finite &= bits < kInfinity;
          base_finite &= is_finite(chunk.base[i]);
          bin.count += bits != 0;
          bin.significands += significand(bits);
        }
        for (uint64_t i = 0; i < chunk.n; i += kLanes) {
          const uint64_t n = std::min<uint64_t>(kLanes, chunk.n - i);
          for (uint64_t j = 0; j < n; ++j) lanes[j] += double(chunk.tau[i + j]) * chunk.tau[i + j];
        }
      });
      c.unit_tau_sq[unit] = add_lanes(lanes);
      std::lock_guard lock(mutex_);
      c.finite &= finite;
      c.base_finite &= base_finite;
      std::vector<Tally>& all = tallies[number(c)];
      if (all.empty()) {
        all = std::move(tally);
        return;
      }
      for (uint32_t bin = 0; bin < kBins; ++bin) {
        all[bin].count += tally[bin].count;
        all[bin].significands += tally[bin].significands;
      }
    }, [&](Candidate& c) {
      const std::vector<Tally> all = std::move(tallies[number(c)]);
      if (!c.finite) return;
      for (double tau_sq : c.unit_tau_sq) c.tau_sq += tau_sq;
      uint64_t kept = 0;
      for (uint32_t bin = kBins; bin-- > 0;) {
        if (!all[bin].count) continue;
        kept += all[bin].count;
        c.bins.push_back({bin, kept, sum_of(bin, all[bin].significands)});
      }
      c.hull = find_hull(c.elements, c.tau_sq, c.bins);
    });
  }

  void allocate_to(uint64_t elements) {
    std::vector<Curve> curves;
    for (const Candidate& c : candidates_) curves.push_back({c.elements, &c.hull});
    const DraftTask& task = d_.tasks[task_];
    Budget budget{task.threshold, d_.recipe.density, d_.recipe.least_bits, static_cast<double>(elements)};
    if (!alone_) {
      budget.bits = 1;
      budget.least = true;
    }
    const std::vector<uint64_t> kept = allocate(budget, curves, text("task '", task.name, "'"));
    for (size_t i = 0; i < kept.size(); ++i) candidates_[i].kept = kept[i];
  }

  // The second reading, of those tensors that do not keep whole bins: where the cut is. The scales.
  void find_cuts() {
    struct Inside {
      std::vector<uint32_t> bits;    // of a tensor of one unit
      std::vector<uint64_t> counts;  // of a larger one, by what their bits are within the bin
    };
    std::vector<Inside> inside(candidates_.size());
    const auto is_cut = [](const Candidate& c) { return c.kept && last_bin(c)->kept != c.kept; };
    for_each_unit("finding what is kept", is_cut, [&](Candidate& c, uint64_t unit) {
      const Bin* const bin = last_bin(c);
      std::vector<uint32_t> found;
      for_each_chunk_of(c, unit, [&](const Chunk& chunk) {
        for (uint64_t i = 0; i < chunk.n; ++i) {
          if (chunk.bits[i] >> kBinShift == bin->number && chunk.bits[i]) found.push_back(chunk.bits[i]);
        }
      });
      Inside& all = inside[number(c)];
      if (c.units() == 1) {
        all.bits = std::move(found);
        return;
      }
      std::lock_guard lock(mutex_);
      all.counts.resize(1 << kBinShift);
      for (uint32_t bits : found) ++all.counts[bits % (1 << kBinShift)];
    }, [&](Candidate& c) {
      const Bin* const bin = last_bin(c);
      Inside all = std::move(inside[number(c)]);
      const uint64_t before = bin == c.bins.data() ? 0 : bin[-1].kept;
      const uint64_t above = c.units() == 1 ? cut_among(c, all.bits, c.kept - before)
                                            : cut_by(c, all.counts, bin->number, c.kept - before);
      c.cut.above += before;
      c.cut.sum = sum_of(bin->number, above);
    });
    parallel_for(candidates_.size(), options_.threads, watch(options_, "finding scales"), [&](uint64_t i, unsigned) {
      FloatEnvironment in_this_thread;
      Candidate& c = candidates_[i];
      if (!c.kept) return;
      const Bin* const bin = last_bin(c);
      double sum = 0;
      for (const Bin* b = c.bins.data(); b < bin; ++b) sum += b->sum;
      if (is_cut(c)) {
        c.cut.sum += sum;
      } else {
        c.cut.bits = std::max(bin->number << kBinShift, 1u) - 1;
        c.cut.above = c.kept;
        c.cut.sum = sum + bin->sum;
      }
      c.scale = scale_of(c);
    });
  }

  // The bin in which what is kept ends; something is.
  static const Bin* last_bin(const Candidate& c) {
    const Bin* bin = c.bins.data();
    while (bin->kept < c.kept) ++bin;
    return bin;
  }

  // Sets the cut where the `wanted` largest of a bin are kept, by their bits, or by how many have which. Gives
  // the significands of those above it.
  uint64_t cut_among(Candidate& c, std::vector<uint32_t>& bits, uint64_t wanted) const {
    if (bits.size() < wanted) changed(d_, c.tensor, task_);
    const auto last = bits.begin() + static_cast<ptrdiff_t>(wanted - 1);
    std::nth_element(bits.begin(), last, bits.end(), std::greater<>());
    c.cut.bits = *last;
    uint64_t significands = 0;
    for (uint32_t b : bits) {
      c.cut.equal += b == c.cut.bits;
      if (b <= c.cut.bits) continue;
      ++c.cut.above;
      significands += significand(b);
    }
    c.cut.ties = wanted - c.cut.above;
    return significands;
  }

  uint64_t cut_by(Candidate& c, const std::vector<uint64_t>& counts, uint32_t bin, uint64_t wanted) const {
    uint64_t significands = 0;
    for (uint32_t low = 1 << kBinShift; low-- > 0;) {
      const uint64_t count = counts[low];
      c.cut.bits = bin << kBinShift | low;
      if (c.cut.above + count >= wanted) {
        c.cut.equal = count;
        c.cut.ties = wanted - c.cut.above;
        return significands;
      }
      c.cut.above += count;
      significands += count * significand(c.cut.bits);
    }
    changed(d_, c.tensor, task_);
  }

  float scale_of(const Candidate& c) {
    const float scale = bounded_gain({c.tau_sq, c.cut.dot(), static_cast<double>(c.kept)});
    const DType dtype = entry(c.tensor).dtype;
    if (dtype == DType::F32) return scale;
    Kept sample;
    const uint64_t share = (uint64_t{1} << 32) / std::max<uint64_t>(1, c.kept / kSample);
    for (uint64_t first = 0; first < c.elements; first += kChunk) {
      if (static_cast<uint32_t>(first / kChunk * kScatter) >= share) continue;
      Selection selection(c.cut);
      for_each_chunk(d_, tensor(c), task_, first, std::min(first + kChunk, c.elements), [&](const Chunk& chunk) {
        for (uint64_t at = 0; at < chunk.n; at += 64) sample.add(chunk, at, selection.group(chunk, at).first);
      });
    }
    if (sample.tau.empty()) return scale;
    const double wanted = scaled(sample.moments(1, DType::F32), scale).dot;
    return corrected(sample, scale, wanted, dtype);
  }

  // The third reading: raw planes, one after the other, and the entries.
  void write() {
    for (Candidate& c : candidates_) {
      entry(c.tensor).plane = d_.reserve(PlaneKind::Ternary, 2 * ((c.elements + 7) / 8));
      c.unit_moments.resize(c.units());
    }
    for_each_unit("writing ternary planes", [&](Candidate& c, uint64_t unit) {
      const uint64_t n = std::min(kUnit, c.elements - unit * kUnit);
      const EntryRecord& e = entry(c.tensor);
      std::vector<uint64_t> mask((n + 63) / 64), signs(mask.size());
      Selection selection(c.cut);
      Kept kept;
      for_each_chunk_of(c, unit, [&](const Chunk& chunk) {
        for (uint64_t at = 0; at < chunk.n; at += 64) {
          const uint64_t group = (chunk.first + at) % kUnit / 64;
          std::tie(mask[group], signs[group]) = selection.group(chunk, at);
          if (e.dtype != DType::F32) kept.add(chunk, at, mask[group]);
        }
      });
      const uint64_t size = (n + 7) / 8, half = (c.elements + 7) / 8;
      const uint64_t to = d_.planes[e.plane].record.offset + unit * (kUnit / 8);
      d_.write(mask.data(), size, to);
      d_.write(signs.data(), size, to + half);
      GapCounts gaps{};
      for (uint64_t at = 0; d_.recipe.code_ternary && at < n; at += kTernaryBlock) {
        TernaryCoder::count(reinterpret_cast<const uint8_t*>(mask.data()) + at / 8,
                            std::min(kTernaryBlock, n - at), gaps);
      }
      c.unit_moments[unit] = kept.moments(c.scale, e.dtype);
      std::lock_guard lock(mutex_);
      for (uint32_t s = 0; s < kGapSymbols; ++s) c.gaps[s] += gaps[s];
      selection.add_to(c.found);
    }, [&](Candidate& c) {
      if (c.found.largest >= kInfinity || c.found.above != c.cut.above || c.found.equal != c.cut.equal) {
        changed(d_, c.tensor, task_);
      }
      c.cut.ties = c.found.ties;
      EntryRecord& e = entry(c.tensor);
      e.scale = c.scale;
      e.set_bits = e.published_bits = c.cut.above + c.cut.ties;
      Moments m = scaled({c.tau_sq, c.cut.dot(), static_cast<double>(e.set_bits)}, c.scale);
      if (e.dtype != DType::F32) {
        m = {c.tau_sq};
        for (const Moments& unit : c.unit_moments) m.add(unit);
      }
      e.tau_sq = m.tau_sq;
      e.dot = m.dot;
      e.approx_sq = m.approx_sq;
      if (!d_.recipe.code_ternary) d_.sum(e.plane);
    });
  }

  void code(uint64_t begin) {
    std::vector<Move> moves;
    for (const Candidate& c : candidates_) {
      const TernaryCoder coder(c.gaps);
      const uint64_t blocks = (c.elements + kTernaryBlock - 1) / kTernaryBlock, elements = c.elements;
      const uint32_t plane = entry(c.tensor).plane;
      moves.push_back({plane, PlaneCoding::Gaps, blocks, coder.table(),
                       [this, coder, plane, elements](uint64_t block) {
        const uint64_t first = block * kTernaryBlock, n = std::min(kTernaryBlock, elements - first);
        const Source source = d_.source(plane);
        std::vector<uint8_t> mask, signs;
        return coder.code(source.view(first / 8, (n + 7) / 8, mask),
                          source.view((elements + 7) / 8 + first / 8, (n + 7) / 8, signs), n);
      }});
    }
    pack(d_, begin, std::move(moves), options_, "coding ternary planes");
  }

  Draft& d_;
  const uint32_t task_;
  const Options& options_;
  const bool alone_;  // the task has no masks
  std::vector<Candidate> candidates_;
  std::mutex mutex_;
};

}  // namespace

void sparsify(Draft& draft, const Options& options) {
  for (uint32_t task = 0; task < draft.tasks.size(); ++task) {
    const bool done = draft.journal.has(Journal::Step::Sparsified, task);
    const bool any = std::any_of(draft.tensors.begin(), draft.tensors.end(), [&](const DraftTensor& t) {
      return t.record.alias == kNone && t.entries[task].record.coding == Coding::Ternary;
    });
    if (done || !(any || draft.tasks[task].method == Method::Ternary)) continue;
    Sparsifier(draft, task, options).run();
    Journal::Changes changes;
    for (uint32_t i = 0; i < draft.tensors.size(); ++i) {
      const EntryRecord& e = draft.tensors[i].entries[task].record;
      changes.entries.emplace_back(task, i);
      if (e.coding == Coding::Ternary && draft.tensors[i].record.alias == kNone) changes.planes.push_back(e.plane);
    }
    draft.journal.add(Journal::Step::Sparsified, task, draft, changes);
  }
}

}  // namespace tallcodec
