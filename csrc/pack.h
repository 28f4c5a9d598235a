// Planes as they were made, raw, to coded ones, which are smaller.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "draft.h"

namespace tallcodec {

// A raw plane on its way up. Without blocks it stays as it is.
struct Move {
  uint32_t plane;
  PlaneCoding coding = PlaneCoding::Raw;  // of the blocks
  uint64_t blocks = 0;
  std::string table;  // for all blocks
  std::function<std::string(uint64_t block)> code;  // reads the plane from the file
};

// Codes planes that lie one after the other, from `begin` to the file's end, in place: each moves up to where the
// one before it ends now. One that coding would not make smaller stays raw; a dropped one is gone. The journal, if
// there is one, says which are done, and is told.
void pack(Draft& draft, uint64_t begin, std::vector<Move> moves, const Options& options, const char* step,
          Journal* journal = nullptr);

// Codes the masks of a file given the shared vectors that it holds. Nothing lies behind them yet.
void pack_masks(Draft& draft, const Options& options);

}  // namespace tallcodec
