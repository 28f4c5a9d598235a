// What has to be known of all values before the first can be coded. Reads them once for every
// question it answers, and keeps counts, never values.
#pragma once
#include <vector>

#include "draft.h"
#include "merge.h"

namespace tallcodec {

struct Survey {
  std::vector<float> cut;  // per task: the smallest magnitude among the largest elements of its
                           // task vector (Merge::Ties, Method::Magnitude)
  float majority = -1;     // the sign that most elements of the trimmed sum have; -1 if as many
};

// How a tensor's task vectors are merged, for any stretch of its values.
class Merger {
 public:
  Merger(const Draft& draft, const DraftTensor& tensor, const Survey& survey);
  // The n elements that `values`, open for the same tensor, holds.
  MergeBlock block(const Values& values, uint64_t n) const;

 private:
  MergeBlock block_{};
  std::vector<float> cuts_;
};

// Tasks in whose tensors NaN or infinity turns up become verbatim there on the way.
Survey survey(Draft& draft, const Options& options);

}  // namespace tallcodec
