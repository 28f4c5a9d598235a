#include "adapt.h"

#include <algorithm>
#include <cmath>

#include "float_environment.h"
#include "mask_math.h"
#include "parallel.h"

namespace tallcodec {
namespace {

constexpr uint64_t kBlock = 4096;      // elements of a sample that lie together
constexpr uint64_t kEnough = 1 << 18;  // elements of a sample, or up to twice as many

using Ratios = std::vector<RatioBin>;

// Twice the greatest ratio with which the cosine of m∘s and the task vector is near the best one,
// m being the mask of what is in its bin and above.
float factor_of(const Ratios& bins) {
  double cosine[kRatioBins], dot = 0, approx_sq = 0, best = 0;
  for (uint32_t i = kRatioBins; i-- > 0;) {
    dot += bins[i].dot;
    approx_sq += bins[i].approx_sq;
    cosine[i] = approx_sq > 0 ? dot / std::sqrt(approx_sq) : 0;
    best = std::max(best, cosine[i]);
  }
  uint32_t bin = kRatioBins - 1;
  while (bin > 0 && cosine[bin] < kNear * best) --bin;
  return best > 0 ? 2 * least_ratio(bin) : 1;
}

void adapt_tensor(const Draft& d, DraftTensor& t, const Survey& survey) {
  const std::vector<uint32_t> coded = t.coded();
  const uint64_t n = t.elements(), stride = std::max<uint64_t>(1, n / kEnough) * kBlock;
  const Merger merger(d, t, survey);
  std::vector<Ratios> ratios(coded.size(), Ratios(kRatioBins));
  float s[kBlock];
  Values values;
  values.open(d, t);
  for (uint64_t at = 0; at < n; at += stride) {
    values.read(at, std::min(kBlock, n - at));
    const MergeBlock block = merger.block(values, std::min(kBlock, n - at));
    merge(block, s);
    for (uint64_t i = 0; i < block.n; ++i) s[i] = shared_value(s[i]);
    for (uint32_t k = 0; k < coded.size(); ++k) add_ratios(block, k, s, ratios[k].data());
  }
  for (size_t k = 0; k < coded.size(); ++k) {
    t.entries[coded[k]].record.factor = factor_of(ratios[k]);
  }
}

}  // namespace

void adapt(Draft& draft, const Survey& survey, const std::vector<uint32_t>& tensors,
           const Options& options) {
  parallel_for(tensors.size(), options.threads, options.poll, [&](uint64_t i, unsigned) {
    FloatEnvironment in_this_thread;
    adapt_tensor(draft, draft.tensors[tensors[i]], survey);
  });
}

}  // namespace tallcodec
