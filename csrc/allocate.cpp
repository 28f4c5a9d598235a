#include "allocate.h"

#include <algorithm>
#include <cmath>

#include "tallcodec.h"
#include "text.h"

namespace tallcodec {
namespace {

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

// No more of a tensor than this is kept, but for all of one whose magnitudes are nearly equal: what is
// small then costs more than it is worth (docs/benchmarks.md).
constexpr double kMostKept = 0.9, kEqual = 0.95;  // a share; a squared cosine

// Adds a point to the hull, `sum` being that of the magnitudes kept. With the scale that makes the gain 1
// the error is orthogonal to tau, and its square tau_sq * (1 / cos^2 - 1). Tensors compete by that over
// the root of tau_sq, not by the whole of it: on real families small task vectors matter more than
// their size says.
void add_point(std::vector<Point>& points, uint64_t elements, double tau_sq, uint64_t kept, double sum) {
  const auto k = static_cast<double>(kept), n = static_cast<double>(elements);
  const double inverse = tau_sq * k / (sum * sum);  // of the squared cosine
  const Point p{kept, entropy(n, k), std::sqrt(tau_sq) * (inverse - 1)};
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

}  // namespace

// A point for every bin and, where one more than doubles what is kept, for every doubling in it; one for
// the most that is kept.
std::vector<Point> find_hull(uint64_t elements, double tau_sq, const std::vector<Bin>& bins) {
  const auto most = static_cast<uint64_t>(kMostKept * static_cast<double>(elements));
  std::vector<Point> points;
  double sum = 0;
  uint64_t before = 0;
  for (const Bin& bin : bins) {
    const double mean = bin.sum / static_cast<double>(bin.kept - before);
    const auto inside = [&](uint64_t k) {
      add_point(points, elements, tau_sq, k, sum + static_cast<double>(k - before) * mean);
    };
    uint64_t k = std::max<uint64_t>(1, 2 * before);
    for (; k < bin.kept && k < most; k *= 2) inside(k);
    if (before < most && most < bin.kept) inside(most);
    sum += bin.sum;
    add_point(points, elements, tau_sq, bin.kept, sum);
    before = bin.kept;
  }
  return points;
}

std::vector<uint64_t> allocate(const Budget& budget, const std::vector<Curve>& tensors, const std::string& task) {
  struct Step {
    double slope;
    size_t tensor, point;
  };
  const bool by_bits = budget.bits > 0;
  const double all = by_bits ? budget.bits * budget.elements : std::floor(budget.density * budget.elements);
  const auto cost = [&](const Point& p) { return by_bits ? p.bits : static_cast<double>(p.kept); };
  double spent = 0;
  std::vector<Step> steps;
  std::vector<uint64_t> kept(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const std::vector<Point>& points = *tensors[i].hull;
    if (points.empty()) continue;
    kept[i] = points[0].kept;
    spent += cost(points[0]);
    for (size_t k = 0; k + 1 < points.size(); ++k) {
      const Point &a = points[k], &b = points[k + 1];
      steps.push_back({(a.error - b.error) / (b.bits - a.bits), i, k});
    }
  }
  if (spent > all && !(by_bits && budget.least)) {
    throw Error(Status::Argument,
                text(task, ": ", by_bits ? "bits=" : "density=", by_bits ? budget.bits : budget.density,
                     " cannot be met: the least, with something of every tensor, is ", spent / budget.elements));
  }
  std::stable_sort(steps.begin(), steps.end(),
                   [](const Step& a, const Step& b) { return a.slope > b.slope; });
  for (const Step& step : steps) {
    const Curve& tensor = tensors[step.tensor];
    const Point &a = (*tensor.hull)[step.point], &b = (*tensor.hull)[step.point + 1];
    const double price = cost(b) - cost(a);
    if (spent + price > all) {
      if (spent > all || (by_bits && 3 * b.kept > 2 * tensor.elements)) break;
      kept[step.tensor] = a.kept + static_cast<uint64_t>(static_cast<double>(b.kept - a.kept) *
                                                         ((all - spent) / price));
      break;
    }
    spent += price;
    kept[step.tensor] = b.kept;
  }
  return kept;
}

}  // namespace tallcodec
