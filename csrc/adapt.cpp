#include "adapt.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "float_environment.h"
#include "mask_math.h"
#include "merge.h"
#include "parallel.h"

namespace tallcodec {
namespace {

constexpr uint64_t kBlock = 4096;      // elements of a sample that lie together
constexpr uint64_t kSample = 1 << 16;  // elements of a sample, or up to twice as many
constexpr uint64_t kFew = 1024;        // elements in bins: with less, a sample says nothing

using Ratios = std::vector<RatioBin>;

// Fills the bins of these of the tensor's coded tasks, from every stride-th block of its elements.
void fill(const Draft& d, const DraftTensor& t, const Survey& survey, uint64_t stride,
          const std::vector<uint32_t>& tasks, Values& values, std::vector<Ratios>& ratios) {
  const Merger merger(d, t, survey);
  const uint64_t n = t.elements();
  float s[kBlock];
  values.open(d, t);
  for (uint32_t k : tasks) ratios[k].assign(kRatioBins, {});
  for (uint64_t at = 0; at < n; at += stride * kBlock) {
    values.read(at, std::min(kBlock, n - at));
    const MergeBlock block = merger.block(values, std::min(kBlock, n - at));
    if (t.is_stored()) {
      read_shared(d, t, at, block.n, s);
    } else {
      merge(block, s);
      for (uint64_t i = 0; i < block.n; ++i) s[i] = shared_value(s[i]);
      round_to_shared(t.shared_dtype, block.n, s);
    }
    for (uint32_t k : tasks) add_ratios(block, k, s, ratios[k].data());
  }
}

bool has_few(const Ratios& bins) {
  uint64_t count = 0;
  for (uint32_t i = 1; i < kRatioBins; ++i) count += bins[i].count;
  return count < kFew;
}

// Twice the greatest ratio with which the cosine of m∘s and the task vector is near the best one,
// m being the mask of what is in its bin and above.
float factor_of(const Ratios& bins) {
  double cosine[kRatioBins], dot = 0, approx_sq = 0, best = 0;
  for (uint32_t i = kRatioBins; i-- > 1;) {
    dot += bins[i].dot;
    approx_sq += bins[i].approx_sq;
    cosine[i] = approx_sq > 0 ? dot / std::sqrt(approx_sq) : 0;
    best = std::max(best, cosine[i]);
  }
  uint32_t bin = kRatioBins - 1;
  while (bin > 1 && cosine[bin] < kNear * best) --bin;
  return best > 0 ? 2 * least_ratio(bin) : 1;
}

void adapt_tensor(const Draft& d, DraftTensor& t, const Survey& survey, Values& values) {
  const std::vector<uint32_t> coded = t.coded();
  const uint64_t stride = std::max<uint64_t>(1, t.elements() / kSample);
  std::vector<uint32_t> tasks(coded.size()), missed;
  std::iota(tasks.begin(), tasks.end(), 0);
  std::vector<Ratios> ratios(coded.size());
  fill(d, t, survey, stride, tasks, values, ratios);
  for (uint32_t k : tasks) {
    if (stride > 1 && has_few(ratios[k])) missed.push_back(k);
  }
  if (!missed.empty()) fill(d, t, survey, 1, missed, values, ratios);
  for (uint32_t k : tasks) t.entries[coded[k]].record.factor = factor_of(ratios[k]);
}

}  // namespace

void adapt(Draft& draft, const Survey& survey, const std::vector<uint32_t>& tensors,
           const Options& options) {
  std::vector<Values> values(std::max(1u, options.threads));
  parallel_for(tensors.size(), options.threads, watch(options, "adapting masks"), [&](uint64_t i, unsigned worker) {
    FloatEnvironment in_this_thread;
    adapt_tensor(draft, draft.tensors[tensors[i]], survey, values[worker]);
  });
}

}  // namespace tallcodec
