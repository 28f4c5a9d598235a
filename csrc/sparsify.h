// Task vectors to ternary planes: how many elements every tensor keeps, which, and with what scale.
#pragma once
#include "draft.h"

namespace tallcodec {

// Fills in every entry of coding Ternary and appends its plane, by task and tensor. Those of a task with masks, where
// there is no shared vector, have one bit per element, as a mask would. Tensors of tasks in
// which NaN or infinity turns up become verbatim. Reads their values twice, or three times where
// what is kept ends within a bin of magnitudes. Throws Error(Status::Argument) where the
// bits or the density asked for are less than one element of every tensor takes.
void sparsify(Draft& draft, const Options& options);

}  // namespace tallcodec
