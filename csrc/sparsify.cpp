#include "sparsify.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>

#include "float_environment.h"
#include "mask_math.h"
#include "moments.h"
#include "parallel.h"
#include "ternary.h"
#include "text.h"

namespace tallcodec {
namespace {

// Magnitudes by exponent and four bits of fraction: sixteen bins in an octave.
constexpr uint32_t kBinShift = 19, kBins = 1 << (31 - kBinShift);
constexpr uint32_t kInfinity = 0x7f800000;
constexpr uint64_t kChunk = 16384;  // elements looked at together
constexpr int kSearchSteps = 16;    // of the scale, where the checkpoint is rounded to 16 bits

void convert(const uint8_t* array, DType dtype, uint64_t n, float* to) {
  const auto half = [&](uint64_t i) {
    uint16_t h;
    std::memcpy(&h, array + 2 * i, sizeof h);
    return h;
  };
  switch (dtype) {
    case DType::F32: std::memcpy(to, array, n * sizeof *to); break;
    case DType::F16: for (uint64_t i = 0; i < n; ++i) to[i] = f16_to_f32(half(i)); break;
    default: for (uint64_t i = 0; i < n; ++i) to[i] = bf16_to_f32(half(i));
  }
}

// Some consecutive elements of a tensor, from number `first` on.
struct Chunk {
  uint64_t first, n;
  float base[kChunk], tau[kChunk];
  uint32_t bits[kChunk];  // of the magnitudes of tau
};

// Runs visit(chunk) over a tensor's elements.
template <class Visit>
void for_each_chunk(const Draft& d, const DraftTensor& t, uint32_t task, Visit visit) {
  const DraftEntry& e = t.entries[task];
  const auto chunk = std::make_unique<Chunk>();
  std::vector<uint8_t> buffer;
  uint32_t reading = kNone;
  const auto read = [&](const Source& source, DType type, float* to) {
    convert(source.view(chunk->first * size_of(type), chunk->n * size_of(type), buffer), type,
            chunk->n, to);
  };
  try {
    for (uint64_t first = 0; first < t.elements(); first += kChunk) {
      chunk->first = first;
      chunk->n = std::min(kChunk, t.elements() - first);
      reading = kNone;
      read(t.base, t.record.dtype, chunk->base);
      reading = task;
      read(e.source, e.record.dtype, chunk->tau);
      for (uint64_t i = 0; i < chunk->n; ++i) {
        chunk->tau[i] -= chunk->base[i];
        chunk->bits[i] = float_bits(chunk->tau[i]) & 0x7fffffff;
      }
      visit(*chunk);
    }
  } catch (const Error& error) {
    if (error.status != Status::Read) throw;
    throw Error(error.status, text(who(d, t, reading), ": ", error.message), error.system_error);
  }
}

// log2 from additions and multiplications alone, so that no file depends on a library's.
double log2_of(double x) {
  int exponent;
  double m = std::frexp(x, &exponent);
  if (m < 0.70710678118654752) {
    m *= 2;
    --exponent;
  }
  const double t = (m - 1) / (m + 1), square = t * t;
  double sum = 0;
  for (int k = 21; k >= 1; k -= 2) sum = sum * square + 1.0 / k;
  return exponent + t * sum * 2.8853900817779268;  // 2 / ln 2
}

// Bits of a plane of n elements, `kept` of them not 0, at their entropy.
double entropy(double n, double kept) {
  double bits = kept + kept * log2_of(n / kept);
  if (kept < n) bits += (n - kept) * log2_of(n / (n - kept));
  return bits;
}

// What keeping the largest elements of a tensor costs and what error it leaves.
struct Point {
  uint64_t kept;
  double bits, error;
};

struct Bin {
  uint32_t number;
  uint64_t kept;  // elements in it and above
};

// A tensor of a task, as the first reading finds it.
struct Candidate {
  uint32_t tensor = 0;
  uint64_t elements = 0, kept = 0;
  double tau_sq = 0;
  bool finite = true, base_finite = true;
  std::vector<Bin> bins;      // those that are not empty, from the largest magnitude down
  std::vector<Point> points;  // the lower convex hull, from the fewest bits up
};

// No more of a tensor than this is kept, but for all of one whose magnitudes are nearly equal: what is
// small then costs more than it is worth (docs/benchmarks.md).
constexpr double kMostKept = 0.9, kEqual = 0.95;  // a share; a squared cosine

// Adds a point to the hull, `sum` being that of the magnitudes kept. With the scale that makes the gain 1
// the error is orthogonal to tau, and its square tau_sq * (1 / cos^2 - 1). Tensors compete by that over
// the root of tau_sq, not by the whole of it: on real families small task vectors matter more than
// their size says.
void add_point(Candidate& c, uint64_t kept, double sum) {
  const auto k = static_cast<double>(kept), n = static_cast<double>(c.elements);
  std::vector<Point>& points = c.points;
  const double inverse = c.tau_sq * k / (sum * sum);  // of the squared cosine
  const Point p{kept, entropy(n, k), std::sqrt(c.tau_sq) * (inverse - 1)};
  if (!points.empty() && (!(p.error < points.back().error) ||
                          (k > kMostKept * n && !(kEqual * inverse < 1)))) {
    return;
  }
  // Beyond two thirds of a tensor more elements take fewer bits.
  while (!points.empty() && points.back().bits >= p.bits) points.pop_back();
  while (points.size() > 1) {
    const Point &a = points[points.size() - 2], &b = points.back();
    if ((b.error - a.error) * (p.bits - a.bits) < (p.error - a.error) * (b.bits - a.bits)) break;
    points.pop_back();
  }
  points.push_back(p);
}

// A point for every bin and, where one more than doubles what is kept, for every doubling in it; one for
// the most that is kept.
void find_hull(Candidate& c, const std::vector<double>& sums) {
  const auto most = static_cast<uint64_t>(kMostKept * static_cast<double>(c.elements));
  double sum = 0;
  uint64_t before = 0;
  for (const Bin& bin : c.bins) {
    const double mean = sums[bin.number] / static_cast<double>(bin.kept - before);
    const auto inside = [&](uint64_t k) {
      add_point(c, k, sum + static_cast<double>(k - before) * mean);
    };
    uint64_t k = std::max<uint64_t>(1, 2 * before);
    for (; k < bin.kept && k < most; k *= 2) inside(k);
    if (before < most && most < bin.kept) inside(most);
    sum += sums[bin.number];
    add_point(c, bin.kept, sum);
    before = bin.kept;
  }
  if (!c.points.empty()) c.kept = c.points[0].kept;
}

void look_at(const Draft& d, uint32_t task, Candidate& c) {
  const DraftTensor& t = d.tensors[c.tensor];
  std::vector<uint64_t> counts(kBins);
  std::vector<double> sums(kBins);
  Sums lanes{};
  bool finite = true, base_finite = true;
  static_assert(kUnit % kChunk == 0 && kChunk % kLanes == 0);
  for_each_chunk(d, t, task, [&](const Chunk& chunk) {
    for (uint64_t i = 0; i < chunk.n; ++i) {
      const uint32_t bits = chunk.bits[i], bin = bits >> kBinShift;
      finite &= bits < kInfinity;
      base_finite &= is_finite(chunk.base[i]);
      counts[bin] += bits != 0;
      sums[bin] += float_of(bits);
    }
    for (uint64_t i = 0; i < chunk.n; i += kLanes) {
      const uint64_t n = std::min<uint64_t>(kLanes, chunk.n - i);
      for (uint64_t j = 0; j < n; ++j) lanes.tau_sq[j] += double(chunk.tau[i + j]) * chunk.tau[i + j];
    }
    if ((chunk.first + chunk.n) % kUnit == 0) {
      c.tau_sq += add_lanes(lanes.tau_sq);
      lanes = {};
    }
  });
  c.tau_sq += add_lanes(lanes.tau_sq);
  c.finite = finite;
  c.base_finite = base_finite;
  if (!finite) return;
  uint64_t kept = 0;
  for (uint32_t bin = kBins; bin-- > 0;) {
    if (!counts[bin]) continue;
    kept += counts[bin];
    c.bins.push_back({bin, kept});
  }
  find_hull(c, sums);
}

// Shares the task's bits, or a number of elements, among a task's tensors: what lowers the error
// most per bit comes first.
void share(const Draft& d, uint32_t task, double elements, std::vector<Candidate>& candidates) {
  struct Step {
    double slope;
    size_t candidate, point;
  };
  const double bits = d.tasks[task].threshold;
  const bool by_bits = bits > 0;
  const double budget = by_bits ? bits * elements : std::floor(d.recipe.density * elements);
  const auto cost = [&](const Point& p) { return by_bits ? p.bits : static_cast<double>(p.kept); };
  double spent = 0;
  std::vector<Step> steps;
  for (size_t i = 0; i < candidates.size(); ++i) {
    const std::vector<Point>& points = candidates[i].points;
    if (points.empty()) continue;
    spent += cost(points[0]);
    for (size_t k = 0; k + 1 < points.size(); ++k) {
      const Point &a = points[k], &b = points[k + 1];
      steps.push_back({(a.error - b.error) / (b.bits - a.bits), i, k});
    }
  }
  if (spent > budget && !(by_bits && d.recipe.least_bits)) {
    throw Error(Status::Argument,
                text("task '", d.tasks[task].name, "': ", by_bits ? "bits=" : "density=",
                     by_bits ? bits : d.recipe.density,
                     " cannot be met: the least, with something of every tensor, is ",
                     spent / elements));
  }
  std::stable_sort(steps.begin(), steps.end(),
                   [](const Step& a, const Step& b) { return a.slope > b.slope; });
  for (const Step& step : steps) {
    Candidate& c = candidates[step.candidate];
    const Point &a = c.points[step.point], &b = c.points[step.point + 1];
    const double price = cost(b) - cost(a);
    if (spent + price > budget) {
      if (spent > budget || (by_bits && 3 * b.kept > 2 * c.elements)) break;
      c.kept = a.kept + static_cast<uint64_t>(static_cast<double>(b.kept - a.kept) *
                                              ((budget - spent) / price));
      break;
    }
    spent += price;
    c.kept = b.kept;
  }
}

[[noreturn]] void changed(const Draft& d, uint32_t tensor, uint32_t task) {
  throw Error(Status::Read, text(who(d, d.tensors[tensor], task), ": it, or the base, was changed ",
                                 "while it was read"));
}

// The elements kept: those whose magnitude has more than these bits, and the first `ties` of just these.
struct Cut {
  uint32_t bits;
  uint64_t ties;
};

Cut find_cut(const Draft& d, uint32_t task, const Candidate& c) {
  if (!c.kept) return {kInfinity, 0};
  size_t k = 0;
  while (c.bins[k].kept < c.kept) ++k;
  const uint32_t bin = c.bins[k].number;
  if (c.bins[k].kept == c.kept) return {std::max(bin << kBinShift, 1u) - 1, 0};
  std::vector<uint32_t> inside;
  for_each_chunk(d, d.tensors[c.tensor], task, [&](const Chunk& chunk) {
    for (uint64_t i = 0; i < chunk.n; ++i) {
      if (chunk.bits[i] >> kBinShift == bin && chunk.bits[i]) inside.push_back(chunk.bits[i]);
    }
  });
  const uint64_t wanted = c.kept - (k ? c.bins[k - 1].kept : 0);
  if (inside.size() < wanted) changed(d, c.tensor, task);
  const auto last = inside.begin() + static_cast<ptrdiff_t>(wanted - 1);
  std::nth_element(inside.begin(), last, inside.end(), std::greater<>());
  const uint32_t cut = *last;
  const auto above = static_cast<uint64_t>(
      std::count_if(inside.begin(), inside.end(), [&](uint32_t bits) { return bits > cut; }));
  return {cut, wanted - above};
}

// The elements kept of one tensor, in order.
struct Kept {
  std::vector<float> base, tau;

  // Of what is decoded with this scale; element j adds to lane j mod 16.
  Moments moments(double tau_sq, float scale, DType dtype) const {
    switch (dtype) {
      case DType::F32: return sums(tau_sq, scale, [](float step, float) { return step; });
      case DType::F16: return sums(tau_sq, scale, [](float step, float b) {
        return f16_to_f32(f32_to_f16(b + step)) - b;
      });
      default: return sums(tau_sq, scale, [](float step, float b) {
        return bf16_to_f32(f32_to_bf16(b + step)) - b;
      });
    }
  }

 private:
  template <class Approx>
  Moments sums(double tau_sq, float scale, Approx approx) const {
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
    return {tau_sq, add_lanes(dot), add_lanes(approx_sq)};
  }
};

// The scale with which the rounded checkpoint has this sum of tau * approx, or as near as sixteen
// halvings of two octaves around the scale without rounding come.
float corrected(const Kept& kept, double tau_sq, float scale, double wanted, DType dtype) {
  const uint32_t middle = float_bits(scale), octaves = 2u << 23;
  uint32_t low = middle > octaves ? middle - octaves : 0;
  uint32_t high = std::min(middle + octaves, kInfinity - 1);
  double below = kept.moments(tau_sq, float_of(low), dtype).dot;
  double above = kept.moments(tau_sq, float_of(high), dtype).dot;
  for (int step = 0; step < kSearchSteps; ++step) {
    const uint32_t half = low + (high - low) / 2;
    const double dot = kept.moments(tau_sq, float_of(half), dtype).dot;
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

// The plane; the entry's statistics and scale.
std::string encode_tensor(const Draft& d, uint32_t task, const Candidate& c, EntryRecord& e) {
  const DraftTensor& t = d.tensors[c.tensor];
  const Cut cut = find_cut(d, task, c);
  std::vector<uint8_t> mask((c.elements + 7) / 8), signs(mask.size());
  Kept kept;
  uint64_t ties = cut.ties;
  kept.base.reserve(c.kept);
  kept.tau.reserve(c.kept);
  for_each_chunk(d, t, task, [&](const Chunk& chunk) {
    for (uint64_t j = 0; j < chunk.n; ++j) {
      const uint32_t bits = chunk.bits[j];
      if (bits < cut.bits || (bits == cut.bits && !ties)) continue;
      if (bits >= kInfinity) changed(d, c.tensor, task);
      if (bits == cut.bits) --ties;
      const uint64_t i = chunk.first + j;
      mask[i / 8] = uint8_t(mask[i / 8] | 1 << i % 8);
      signs[i / 8] = uint8_t(signs[i / 8] | (chunk.tau[j] < 0) << i % 8);
      kept.base.push_back(chunk.base[j]);
      kept.tau.push_back(chunk.tau[j]);
    }
  });
  if (kept.tau.size() != c.kept || ties) changed(d, c.tensor, task);
  const Moments plain = kept.moments(c.tau_sq, 1, DType::F32);
  e.scale = c.kept ? bounded_gain(plain) : 1;
  Moments m = scaled(plain, e.scale);
  if (e.dtype != DType::F32) {
    e.scale = corrected(kept, c.tau_sq, e.scale, m.dot, e.dtype);
    m = kept.moments(c.tau_sq, e.scale, e.dtype);
  }
  e.set_bits = e.published_bits = c.kept;
  e.tau_sq = m.tau_sq;
  e.dot = m.dot;
  e.approx_sq = m.approx_sq;
  if (d.recipe.code_ternary) return code_ternary(mask.data(), signs.data(), c.elements);
  std::string raw(mask.begin(), mask.end());
  return raw.append(signs.begin(), signs.end());
}

void sparsify_task(Draft& d, uint32_t task, const Options& options) {
  std::vector<Candidate> candidates;
  uint64_t elements = 0;  // of the whole task vector
  for (uint32_t i = 0; i < d.tensors.size(); ++i) {
    const DraftTensor& t = d.tensors[i];
    const Coding coding = t.entries[task].record.coding;
    if (t.record.alias != kNone) continue;
    if (coding == Coding::Ternary) {
      candidates.emplace_back();
      candidates.back().tensor = i;
      candidates.back().elements = t.elements();
    } else if (coding == Coding::Base && is_arithmetic(t.record.dtype)) {
      elements += t.elements();
    }
  }
  parallel_for(candidates.size(), options.threads, watch(options, "looking at magnitudes"), [&](uint64_t i, unsigned) {
    FloatEnvironment in_this_thread;
    look_at(d, task, candidates[i]);
  });
  for (const Candidate& c : candidates) {
    if (!c.finite) d.leave_out(d.tensors[c.tensor].entries[task].record, !c.base_finite);
  }
  candidates.erase(std::remove_if(candidates.begin(), candidates.end(),
                                  [](const Candidate& c) { return !c.finite; }),
                   candidates.end());
  for (const Candidate& c : candidates) elements += c.elements;
  share(d, task, static_cast<double>(elements), candidates);

  // Planes go to the file in order, as soon as those before them are there.
  const PlaneCoding coding = d.recipe.code_ternary ? PlaneCoding::Gaps : PlaneCoding::Raw;
  std::mutex mutex;
  std::map<uint64_t, std::string> waiting;
  uint64_t next = 0;
  parallel_for(candidates.size(), options.threads, watch(options, "coding ternary planes"), [&](uint64_t i, unsigned) {
    FloatEnvironment in_this_thread;
    const Candidate& c = candidates[i];
    std::string plane = encode_tensor(d, task, c, d.tensors[c.tensor].entries[task].record);
    std::lock_guard lock(mutex);
    waiting.emplace(i, std::move(plane));
    for (auto it = waiting.begin(); it != waiting.end() && it->first == next; ++next) {
      const Candidate& ready = candidates[next];
      d.tensors[ready.tensor].entries[task].record.plane = d.append(
          PlaneKind::Ternary, coding, it->second, 2 * ((ready.elements + 7) / 8));
      it = waiting.erase(it);
    }
  });
}

}  // namespace

void sparsify(Draft& draft, const Options& options) {
  for (uint32_t task = 0; task < draft.tasks.size(); ++task) {
    if (draft.tasks[task].method == Method::Ternary) sparsify_task(draft, task, options);
  }
}

}  // namespace tallcodec
