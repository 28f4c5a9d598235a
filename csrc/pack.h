// Masks as they were encoded to coded ones, which are smaller.
#pragma once
#include "draft.h"

namespace tallcodec {

// Codes the raw masks of a file, all others of whose planes lie before or behind them, given the shared vectors
// that it holds, in place: every plane moves up to where the one before it ends now.
void pack_masks(Draft& draft, const Options& options);

}  // namespace tallcodec
