// What has to be known of all values before the first can be coded. Reads them once for every
// question it answers, and keeps counts, never values.
#pragma once
#include <vector>

#include "draft.h"

namespace tallcodec {

struct Survey {
  std::vector<float> cut;  // per task: the smallest magnitude among the largest elements of its
                           // task vector (Merge::Ties, Method::Magnitude)
  float majority = -1;     // the sign that most elements of the trimmed sum have; -1 if as many
};

// Tasks in whose tensors NaN or infinity turns up become verbatim there on the way.
Survey survey(Draft& draft, const Options& options);

}  // namespace tallcodec
