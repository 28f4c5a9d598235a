// Adapted masks: how much of the shared vector each task is asked for, found from the weights alone.
#pragma once
#include <vector>

#include "survey.h"

namespace tallcodec {

// How near, of the best cosine of m∘s and a task vector, that of its masks has to be.
constexpr double kNear = 0.85;

// Sets the factor of every task that is coded in one of these tensors, from a sample of its values.
void adapt(Draft& draft, const Survey& survey, const std::vector<uint32_t>& tensors,
           const Options& options);

}  // namespace tallcodec
